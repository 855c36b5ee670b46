"""Our model is a Llama: the same weights in `transformers` give the same logits."""
import dataclasses

import pytest
import torch
from torch import nn

from cs336_lm.transformer import ModelConfig, TransformerLM

transformers = pytest.importorskip("transformers", reason="transformers is the independent implementation")


def half_split(weight, num_heads):
    "Rows of a query or key matrix in the order that Llama's RoPE pairs: in each head first the even entries, then the odd."
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def llama_of(model):
    c = model.config
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads, num_key_value_heads=c.num_heads, max_position_embeddings=c.context_length, rms_norm_eps=1e-5,
        rope_theta=c.rope_theta, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tied_embeddings, attention_bias=False, mlp_bias=False, hidden_act="silu"))
    ours = model.state_dict()
    names = {"model.embed_tokens.weight": "token_embeddings.weight", "model.norm.weight": "ln_final.weight", "lm_head.weight": "lm_head.weight"}
    for i in range(c.num_layers):
        parts = {"self_attn.q_proj": "attn.q_proj", "self_attn.k_proj": "attn.k_proj", "self_attn.v_proj": "attn.v_proj",
                 "self_attn.o_proj": "attn.output_proj", "mlp.gate_proj": "ffn.w1", "mlp.down_proj": "ffn.w2", "mlp.up_proj": "ffn.w3",
                 "input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
        names |= {f"model.layers.{i}.{theirs}.weight": f"layers.{i}.{mine}.weight" for theirs, mine in parts.items()}
    turned = {k: half_split(ours[v], c.num_heads) if "q_proj" in k or "k_proj" in k else ours[v] for k, v in names.items()}
    assert set(names.values()) == set(ours), "every weight of ours has its place"
    llama.load_state_dict(turned)
    return llama.float().eval()


CONFIG = ModelConfig(vocab_size=211, context_length=64, d_model=48, num_layers=3, num_heads=4, d_ff=80)


@pytest.mark.parametrize("changes", [{}, {"rope_theta": 100.0}, {"tied_embeddings": True, "embedding_std": 0.1}, {"attention": "clear"}], ids=str)
def test_same_logits_and_gradients(changes):
    torch.manual_seed(0)
    model = TransformerLM(dataclasses.replace(CONFIG, **changes))
    for name, p in model.named_parameters():
        if "ln" in name: nn.init.uniform_(p, 0.5, 2)
    llama, ids = llama_of(model), torch.randint(0, 211, (3, 64))
    ours, theirs = model(ids), llama(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for out in (ours, theirs): out.log_softmax(-1)[..., 7].sum().backward()
    torch.testing.assert_close(model.token_embeddings.weight.grad, llama.model.embed_tokens.weight.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(half_split(model.layers[1].attn.k_proj.weight.grad, 4), llama.model.layers[1].self_attn.k_proj.weight.grad, rtol=1e-3, atol=1e-4)


def test_the_order_of_pairs_matters():
    "Without the reordering the logits differ, so the test above does test RoPE."
    torch.manual_seed(0)
    model = TransformerLM(CONFIG)
    llama, ids = llama_of(model), torch.randint(0, 211, (1, 64))
    llama.model.layers[0].self_attn.q_proj.weight.data.copy_(model.layers[0].attn.q_proj.weight)
    assert (llama(ids).logits - model(ids)).abs().max() > 1e-3


def test_same_logits_with_both_caches():
    torch.manual_seed(0)
    model = TransformerLM(CONFIG)
    llama, ids, cache, theirs = llama_of(model), torch.randint(0, 211, (2, 20)), model.make_cache(), None
    with torch.no_grad():
        for piece in ids.split([5, 1, 1, 13], 1):
            out = llama(piece, past_key_values=theirs, use_cache=True)
            theirs = out.past_key_values
            torch.testing.assert_close(model(piece, cache), out.logits, rtol=1e-5, atol=1e-5)
