"The fuzz tool: five seconds of it, and that it finds what is planted."
import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("numba")
TOOL = Path(__file__).resolve().parent.parent / "tools" / "fuzz_tokenizer.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_tokenizer", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_five_seconds_find_nothing(fuzz):
    done = fuzz.engine_process("compiled", seed=336, seconds=5)
    assert done["different"] is None
    assert set(done["by_check"]) == set(fuzz.NAMES)


def test_a_planted_mutation_is_found(fuzz):
    found = fuzz.find_mutation("tie", "plain", seed=336, seconds=60)
    assert found["caught"] and found["by"] == "train"


def test_mutations_fit_the_code(fuzz, tmp_path):
    for name in fuzz.MUTATIONS: fuzz.mutated(name, tmp_path / name)


def test_texts_depend_on_the_seed_alone(fuzz):
    some = lambda seed: [texts.next() for texts in [fuzz.Texts(seed)] for _ in range(20)]
    assert some(1) == some(1) != some(2)


def test_a_difference_is_made_small(fuzz):
    class Checks:
        def holds(self, case): return "bad" if "x" in case.text and "y" in case.text else None
    case = type("Case", (), {"text": "many words, x among them, and y too"})()
    assert sorted(fuzz.shortest(Checks(), "holds", case)) == ["x", "y"]
