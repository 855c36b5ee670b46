"""The embedded story grammar: against enumeration by string replacement, by properties, by faults."""
import math, random, re, statistics
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from cs336_lm import corpora
from cs336_lm.corpora import (END_OF_TEXT, STORY_GRAMMAR, STORY_RULES, STORY_TABLES, Grammar, collision_probability, entropy, find_corpus,
                              held_out_floor, parse_story, parse_text, population_floor, read_documents, sample, sample_story, sentence_parses,
                              sizes, split_sentences, story_entropy, table, write_stories)

WORD = re.compile(r"\w+")


def words_and_marks(text): return re.findall(r"\w+|[^\w\s]+", text)


@pytest.fixture(scope="module")
def stories():
    rng = random.Random(7)
    return [sample_story(rng) for _ in range(2_000)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory): return find_corpus("stories", tmp_path_factory.mktemp("stories"))


@pytest.fixture(scope="module")
def train(corpus): return list(read_documents(corpus.train))


# ---------------------------------------------------------------- the machinery, on random tiny grammars

def all_texts(rules, tables, text="{story}", rows=(), p=1.0):
    "Every (text, probability) of a grammar, by replacing the first brace until none is left; knows nothing of trees."
    hole = re.search(r"\{([^{}]+)\}", text)
    if not hole: return [(text, p)]
    name, rows = hole[1], dict(rows)
    if name.startswith("choose "):
        slot = name.split()[1]
        options = [(list(row.values())[0], 1, {**rows, slot: row}) for row in tables[slot]]
    elif (slot := name.split(".")[0]) in tables:
        column = name.partition(".")[2] or list(tables[slot][0])[0]
        options = [(rows[slot][column] if column in rows[slot] else rows[slot][column.lower()].capitalize(), 1, rows)]
    else:
        templates = dict.fromkeys(name.split("|"), 1) if "|" in name else rules[name]
        options = [(t, w, rows) for t, w in (templates.items() if isinstance(templates, dict) else dict.fromkeys(templates, 1).items())]
    total = sum(w for _, w, _ in options)
    return [end for t, w, r in options for end in all_texts(rules, tables, text[:hole.start()] + t + text[hole.end():], r.items(), p * w / total)]


@st.composite
def tiny_grammars(draw):
    "Rules and tables: a slot of two columns, a weighted rule inside another, words between bars, references before and after."
    names = iter(draw(st.permutations([f"w{i}" for i in range(26)])))
    some = lambda least, most: [next(names) for _ in range(draw(st.integers(least, most)))]
    end = draw(st.sampled_from([".", "!", '."', ""]))
    heroes = some(1, 3)
    shared = draw(st.booleans())
    tables = {"hero": [{"name": h, "he": "it" if shared else h + "x", "home": draw(st.sampled_from(["in a den", "at sea", "den"]))} for h in heroes]}
    inner = {w + draw(st.sampled_from(["", " {hero.he}", " and {" + "|".join(some(2, 3)) + "}"])): draw(st.integers(1, 5)) for w in some(1, 3)}
    rules = {"inner": inner,
             "outer": [w + draw(st.sampled_from([" {inner}", " {hero.He}", ", {hero.home}"])) for w in some(1, 3)],
             "story": ["A {choose hero} {inner}, {outer}" + end, next(names) + " {choose hero} \"{outer}\" {hero.home} {inner}" + end]}
    return rules, tables


@settings(max_examples=80, deadline=None)
@given(tiny_grammars(), st.integers(0, 2**32))
def test_machinery_agrees_with_enumeration(rules_and_tables, seed):
    rules, tables = rules_and_tables
    grammar, listed = Grammar(rules, tables), all_texts(rules, tables)
    texts = dict(listed)
    assert len(texts) == len(listed), "two rows of choices gave one text"
    assert math.fsum(texts.values()) == pytest.approx(1)
    for text, p in texts.items(): assert parse_text(grammar, text).log_probability == pytest.approx(math.log(p), abs=1e-9)
    assert entropy(grammar.root) == pytest.approx(-math.fsum(p * math.log(p) for p in texts.values()), abs=1e-9)
    assert collision_probability(grammar.root) == pytest.approx(math.fsum(p * p for p in texts.values()))
    least, mean, most = sizes(grammar, grammar.root, len)
    assert mean == pytest.approx(math.fsum(p * len(t) for t, p in texts.items()))
    assert least <= min(map(len, texts)) and max(map(len, texts)) <= most
    rng = random.Random(seed)
    for story in (sample(grammar, rng) for _ in range(20)):
        assert story.text in texts and parse_text(grammar, story.text) == story


def test_frequencies_follow_the_probabilities():
    rules = {"story": {"{choose hero} met {choose hero2}, and {hero.he} {sang|left}.": 3, "Only {choose hero} came {late|soon}.": 1}}
    tables = {"hero": table("name | he\n Tom | he\n Lily | she\n Max | he"), "hero2": table("name\n an owl\n some bees")}
    texts, rng = dict(all_texts(rules, tables)), random.Random(0)
    counts = Counter(sample(Grammar(rules, tables), rng).text for _ in range(10_000))
    chi2 = sum((counts[t] - 10_000 * p) ** 2 / (10_000 * p) for t, p in texts.items())
    assert len(texts) == 18 and counts.keys() == texts.keys() and chi2 < 43  # 17 degrees of freedom: above it once in 2,000


def test_the_same_seed_gives_the_same_text_on_every_python():
    grammar = Grammar({"story": ["{a|b|c|d|e|f|g} {a|b|c|d|e|f|g} {a|b|c|d|e|f|g} {x}."], "x": {"p": 1, "q": 5}}, {})
    rng = random.Random(1)
    assert [sample(grammar, rng).text for _ in range(4)] == ["f f b q.", "e f a p.", "d f a q.", "b g g p."]


@pytest.mark.parametrize("rules, said", [
    ({"story": ["{a cat|a dog} ran."]}, "begin with 'a'"),
    ({"story": ["Tom ran.", '"Tom sat."']}, "begin with 'Tom'"),
    ({"story": ["{choose hero} ran.", "Tom sat."]}, "begin with 'Tom'"),
    ({"story": ["{inner} ran.", "One sat."], "inner": ["One", "Two"]}, "begin with 'One'"),
    ({"story": ["{choose hero} met {he|{hero.he}}."]}, "brace"), ({"story": ["See {choose hero."]}, "brace"),
    ({"story": ["Then {hero} ran."]}, "choose hero"),
    ({"story": ["{one} {hero} ran."], "one": ["So {choose hero}", "Then"]}, "choose hero"),
    ({"story": ["See {choose hero}. {hero.her} ran."]}, "no column 'her'"),
    ({"story": ["See {choose dog}."]}, "no table 'dog'"),
    ({"story": ["See {dog}."]}, "'dog'"),
    ({"story": ["See {two}."], "two": ["Or {story}"]}, "contains itself"),
    ({"story": ["See two{ red| blue} birds."]}, "touches"),
    ({"story": ["See {cat|dog}s."]}, "touches"),
    ({"story": ["See {cat|...}."]}, "has no word"),
    ({"story": ["See {choose place} {place.way}."]}, "beginning of 'up the"),
])
def test_grammars_that_cannot_be_parsed_back_are_refused(rules, said):
    tables = {"hero": table("name | he\n Tom | he\n Lily | she"), "place": table("name | way\n hill | up\n tree | up the stem")}
    with pytest.raises(ValueError, match=said): Grammar(rules, tables)


def test_tables():
    assert table("a | b\n\n x y | z \n") == [{"a": "x y", "b": "z"}]
    with pytest.raises(ValueError, match="1 cells"): table("a | b\n x")


# ---------------------------------------------------------------- the stories

def test_sampler_parser_and_probability_agree(stories):
    for story in stories: assert parse_story(story.text) == story
    assert sum(story.log_probability for story in stories) == pytest.approx(sum(
        math.log(STORY_GRAMMAR.choices[name].probabilities[k]) for story in stories for name, k in story.choices))
    surprise = [-story.log_probability for story in stories]
    assert abs(statistics.mean(surprise) - story_entropy()) < 4 * statistics.stdev(surprise) / math.sqrt(len(stories))
    lengths = [len(story.text.encode()) for story in stories]
    least, mean, most = sizes(STORY_GRAMMAR, STORY_GRAMMAR.root, lambda text: len(text.encode()))
    assert least <= min(lengths) and max(lengths) <= most
    assert abs(statistics.mean(lengths) - mean) < 4 * statistics.stdev(lengths) / math.sqrt(len(stories))


def test_bounds_of_the_stories(stories):
    written = [t for rule in STORY_RULES.values() for t in rule] + [c for rows in STORY_TABLES.values() for row in rows for c in row.values()]
    literal = " ".join(re.sub(r"\{([^{}]*)\}", lambda m: m[1].replace("|", " ") if "|" in m[1] else " ", t) for t in written)
    forms = {word for story in stories for word in WORD.findall(story.text)}
    capitals = {word.capitalize() for word in WORD.findall(literal)}
    assert forms <= {*WORD.findall(literal), *capitals} and len(forms) <= 600
    longest = max(len(sentence.split()) for story in stories for sentence in split_sentences(story.text))
    assert longest <= 30


def test_chosen_things_come_back(stories):
    "Hero, helper, wish, colour and the like are named again later, and a long way off."
    distances = []
    for story in stories[:1_000]:
        chosen, words = dict(story.choices), WORD.findall(story.text)
        named = {slot: list(STORY_TABLES[slot][chosen[slot]].values())[0] for slot in ("hero", "helper", "wish", "colour")}
        places = {slot: [i for i, word in enumerate(words) if word == name] for slot, name in named.items()}
        assert len(places["wish"]) >= 2 and len(places["colour"]) >= 2 and len(places["helper"]) >= 2
        he = STORY_TABLES["hero"][chosen["hero"]]["he"]
        other = {"he": "she", "she": "he"}[he]
        assert len(places["hero"]) + sum(word.lower() == he for word in words) >= 3 and other not in [word.lower() for word in words]
        distances.append(places["wish"][-1] - places["wish"][0])
    assert statistics.median(distances) > 60


def test_ten_megabytes_without_a_repeated_story(corpus, train):
    valid = list(read_documents(corpus.valid))
    assert corpus.train.stat().st_size >= 10_000_000 and len({*train, *valid}) == len(train) + len(valid)
    assert corpus.train.read_bytes() == "".join(story + END_OF_TEXT for story in train).encode()
    for story in train[::500]: parse_story(story)


def test_no_long_run_of_words_is_found_twice(train):
    "No 31 words on end of a new story stand in the training text, so that whoever finds such a run in a sample has found copying."
    ids = {}
    def runs(texts, length=31):
        hashes = []
        for text in texts:
            row = np.array([ids.setdefault(word, len(ids) + 1) for word in text.split()], dtype=np.uint64)
            power = np.uint64(6364136223846793005)
            value = np.zeros(len(row) - length + 1, dtype=np.uint64)
            for i in range(length): value = value * power + row[i:len(row) - length + 1 + i]
            hashes.append(value)
        return np.concatenate(hashes)
    known, rng = runs(train), random.Random(99)
    fresh = runs(sample_story(rng).text for _ in range(200))
    assert np.isin(runs(train[:3]), known).all() and not np.isin(fresh, known).any()


def test_tokens_of_the_demo_tokenizer(train, tmp_path):
    "60 to 160 tokens a story, separator counted, and nearly one a word, with a vocabulary of 1,024 entries."
    bpe, tokenizer = pytest.importorskip("cs336_lm.bpe"), pytest.importorskip("cs336_lm.tokenizer")
    (tmp_path / "t.txt").write_text(END_OF_TEXT.join(train))
    vocab, merges = bpe.train_bpe(tmp_path / "t.txt", 1_024, [END_OF_TEXT])
    encode = tokenizer.Tokenizer(vocab, merges, [END_OF_TEXT]).encode
    counts = [len(encode(story)) + 1 for story in train]
    assert 60 <= min(counts) and max(counts) <= 160
    assert sum(counts) < 1.08 * sum(len(words_and_marks(story)) + 1 for story in train)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.data())
def test_a_changed_story_is_another_story_or_none(seed, data):
    story = sample_story(random.Random(seed))
    words = story.text.split(" ")
    i = data.draw(st.integers(0, len(words) - 1))
    change = data.draw(st.sampled_from(["drop", "double", "swap", "cut", "space"]))
    if change == "drop": words[i:i + 1] = []
    if change == "double": words[i:i + 1] = [words[i]] * 2
    if change == "swap": words[i] = data.draw(st.sampled_from(words))
    if change == "cut": words = words[:i]
    if change == "space": words[i] += " "
    if (text := " ".join(words)) == story.text: return
    try: other = parse_story(text)
    except ValueError as error: assert "character" in str(error)
    else: assert other.text == text and other.choices != story.choices and change == "swap"


@settings(max_examples=200, deadline=None)
@given(st.text() | st.lists(st.sampled_from(["Once", "upon", "a", "time", ",", "Tom", "he", ".", " ", '"']), max_size=30).map(" ".join))
def test_any_other_text_is_refused_in_words(text):
    with pytest.raises(ValueError, match="no text of the grammar"): parse_story(text)
    assert not sentence_parses(text)


# ---------------------------------------------------------------- sentences

def test_each_sentence_parses_alone(stories):
    for story in stories[:400]:
        sentences = split_sentences(story.text)
        assert " ".join(sentences) == story.text and len(sentences) == 12 and all(map(sentence_parses, sentences))
        assert not sentence_parses(" ".join(sentences[:2])) and not sentence_parses(sentences[3][:-1])


@pytest.mark.parametrize("sentence, good", [
    ("Her aunt gave her a bath and she flew the kite for hours.", True), ("Her aunt gave him a bath and she flew the kite for hours.", False),
    ("Her aunt gave her a bath and she flew the drum for hours.", False), ("Lily kicked the ball all day and slept in her cave.", True),
    ("Lily kicked the ball all day and slept in his cave.", False), ("Every day, she waddled to the mill to sing.", True),
    ("every day, she waddled to the mill to sing.", False), ("Then the owl dug a path with a tiny spade.", True),
    ("Then the owl dug a path with a tiny rope.", False),
])
def test_agreement_within_a_sentence(sentence, good): assert sentence_parses(sentence) is good


def test_split_sentences():
    assert split_sentences(' Tom ran. "Stop!" He said, "Now."  Why? ') == ["Tom ran.", '"Stop!"', 'He said, "Now."', "Why?"]
    assert split_sentences("") == [] and split_sentences("no end") == ["no end"]


# ---------------------------------------------------------------- floors and files

def test_held_out_floor(stories, tmp_path):
    path = tmp_path / "held.txt"
    path.write_text("".join(story.text + END_OF_TEXT for story in stories[:300]))
    nats = -sum(story.log_probability for story in stories[:300])
    floor = held_out_floor(path, 40_000)
    assert floor.nats_per_token == pytest.approx(nats / 40_000)
    assert floor.bits_per_byte == pytest.approx(nats / math.log(2) / path.stat().st_size)
    path.write_text("\n".join(story.text + "\n" + END_OF_TEXT for story in stories[:300]))  # as other corpora are written
    assert held_out_floor(path, 40_000).nats_per_token == pytest.approx(nats / 40_000)


def test_floors_of_sample_and_population_agree(corpus):
    documents = list(read_documents(corpus.valid))
    counts = [len(words_and_marks(story)) + 1 for story in documents]
    mean = sizes(STORY_GRAMMAR, STORY_GRAMMAR.root, lambda text: len(words_and_marks(text)))[1] + 1
    held, population = held_out_floor(corpus.valid, sum(counts)), population_floor(mean)
    assert population.nats_per_token == pytest.approx(story_entropy() / mean)
    differences = [-parse_story(story).log_probability - population.nats_per_token * n for story, n in zip(documents, counts)]
    error = statistics.stdev(differences) / math.sqrt(len(documents)) / mean
    assert abs(held.nats_per_token - population.nats_per_token) < 4 * error < 0.01
    assert held.bits_per_byte == pytest.approx(population.bits_per_byte, rel=0.02)


@pytest.mark.parametrize("content, tokens, said", [("Tom ran.", 3, "held.txt.*not made by the story grammar.*character 3"), ("", 3, "no story"),
                                                   (sample_story(random.Random(0)).text, 0, "0 tokens")])
def test_floors_that_do_not_exist(tmp_path, content, tokens, said):
    (tmp_path / "held.txt").write_text(content)
    with pytest.raises(ValueError, match=said): held_out_floor(tmp_path / "held.txt", tokens)


def test_write_stories(tmp_path):
    count = write_stories(tmp_path / "a.txt", 30_000, 5)
    assert write_stories(tmp_path / "b.txt", 30_000, 5) == count and (tmp_path / "a.txt").read_bytes() == (tmp_path / "b.txt").read_bytes()
    assert 30_000 <= (tmp_path / "a.txt").stat().st_size < 31_000 and len(list(read_documents(tmp_path / "a.txt"))) == count
    write_stories(tmp_path / "b.txt", 30_000, 6)
    assert not {*read_documents(tmp_path / "a.txt")} & {*read_documents(tmp_path / "b.txt")}
    with pytest.raises(ValueError, match="0 bytes.*c.txt"): write_stories(tmp_path / "c.txt", 0, 5)
    assert not (tmp_path / "c.txt").exists()


def test_the_corpus_is_written_once_and_again_for_another_grammar(tmp_path, monkeypatch):
    monkeypatch.setenv("CS336_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(corpora, "STORY_FILES", {"train": (5_000, 1), "valid": (1_000, 2)})
    first = find_corpus("stories")
    assert first.name == "stories" and first.train.parent == tmp_path / "data" and first.train.stat().st_size >= 5_000
    stamp = first.train.stat().st_mtime_ns
    assert find_corpus("stories") == first and first.train.stat().st_mtime_ns == stamp
    first.train.unlink()
    assert find_corpus("stories") == first and first.train.is_file()
    monkeypatch.setitem(STORY_RULES, "time", ["noon"])
    other = find_corpus("stories")
    assert other.train != first.train and other.valid != first.valid and replace(other, train=first.train, valid=first.valid) == first
