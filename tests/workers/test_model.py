from __future__ import annotations

import pytest
import torch

from workers.kv_cache import KvCache
from workers.model import Batch, Decode, Model, Prefill

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
VARIANTS = {
    "grouped heads": {},
    "one kv head": {"num_key_value_heads": 1},
    "as many kv heads": {"num_key_value_heads": 4},
    "head dim apart from D/H": {"head_dim": 24},
    "a head of its own": {"tie_word_embeddings": False},
    "other constants": {
        "rms_norm_eps": 1e-2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 123.0},
    },
}


def prefill(ids, start, table, drawn):
    """A batch of one prompt piece."""
    table, place = torch.tensor(table), torch.arange(start, start + len(ids))
    return Batch(
        tokens=torch.tensor(ids),
        positions=place,
        slots=table[place // 16] * 16 + place % 16,
        prefills=(Prefill(0, len(ids), start, table),),
        decodes=(),
        drawn=torch.tensor(drawn, dtype=torch.int64),
    )


def run(checkpoint, *batches, blocks=8):
    """Logits of each batch in turn, over one cache."""
    model = Model(checkpoint)
    cache = torch.from_numpy(KvCache(checkpoint.shape, blocks).data)
    return [model.forward(batch, cache) for batch in batches]


def reference(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


IDS = torch.randint(300, (40,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_row_has_the_logits_of_transformers(tiny_llama, config):
    hf, checkpoint = tiny_llama(**config)
    (logits,) = run(checkpoint, prefill(IDS, 0, [4, 1, 6], range(40)))
    torch.testing.assert_close(logits, reference(hf, IDS), **CLOSE)


@pytest.mark.parametrize("cut", [2, 15, 16, 17, 38])
def test_a_prompt_in_two_pieces_has_the_same_logits(tiny_llama, cut):
    hf, checkpoint = tiny_llama()
    nothing, logits = run(
        checkpoint,
        prefill(IDS[:cut], 0, [4, 1, 6], []),
        prefill(IDS[cut:], cut, [4, 1, 6], [39 - cut]),
    )
    assert nothing.shape == (0, 300)
    torch.testing.assert_close(logits, reference(hf, IDS)[-1:], **CLOSE)


def test_prefills_and_decodes_share_a_step(tiny_llama):
    hf, checkpoint = tiny_llama()
    other, third = IDS[::-1], IDS[5:8]
    mixed = Batch(
        tokens=torch.tensor([IDS[20], *third, other[4]]),
        positions=torch.tensor([20, 0, 1, 2, 4]),
        slots=torch.tensor([1 * 16 + 4, 7 * 16, 7 * 16 + 1, 7 * 16 + 2, 2 * 16 + 4]),
        prefills=(Prefill(1, 4, 0, torch.tensor([7])),),
        decodes=(
            Decode(torch.tensor([0, 4]), torch.tensor([[3, 1], [2, 2]]), torch.tensor([21, 5])),
        ),
        drawn=torch.tensor([0, 3, 4]),
    )
    *_, logits = run(
        checkpoint, prefill(IDS[:20], 0, [3, 1], []), prefill(other[:4], 0, [2], []), mixed
    )
    expected = [reference(hf, ids)[-1] for ids in (IDS[:21], third, other[:5])]
    torch.testing.assert_close(logits, torch.stack(expected), **CLOSE)


def test_a_tied_head_takes_no_memory_of_its_own(tiny_llama):
    _, checkpoint = tiny_llama()
    model = Model(checkpoint)
    assert model.head.data_ptr() == model.embedding.data_ptr()
    table = checkpoint.array("model.embed_tokens.weight")
    assert torch.equal(model.embedding, torch.from_numpy(table))
