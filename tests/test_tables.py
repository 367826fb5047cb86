"""cos and sin of every position against float64 and transformers, and the module that owns them."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from neox_kernels import RotaryEmbedding, apply_rotary_qk, reference, rotary_tables
from neox_kernels.testing import assert_within_budget

HEAD_DIM, ROTARY_DIM, ORIGINAL = 96, 24, 64
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": ORIGINAL},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn, factor 1": {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": ORIGINAL},
    "yarn, long original": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096},
    "yarn, betas": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 20, "beta_slow": 2
    },
    "yarn, mscale": {
        "rope_type": "yarn", "factor": 9.0, "original_max_position_embeddings": 512, "mscale": 0.7, "mscale_all_dim": 1
    },
    "yarn, attention": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 0.8
    },
    "yarn, not truncated": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "truncate": False
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}  # fmt: skip


@pytest.mark.parametrize("base", [10000.0, 500, 25000.5])
@pytest.mark.parametrize(
    "rotary_dim, max_position", [(2, 7), (16, 2048), (20, 33), (64, 300), (128, 1), (0, 4), (8, 0)]
)
def test_tables_are_the_formula_rounded_once(rotary_dim: int, max_position: int, base: float) -> None:
    tables = rotary_tables(rotary_dim, max_position, base)
    rows = [[p * base ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)] for p in range(max_position)]
    angles = torch.tensor(rows, dtype=torch.float64).view(max_position, rotary_dim // 2)
    for table, oracle in zip(tables, (angles.cos(), angles.sin()), strict=True):
        assert table.dtype == torch.float32 and table.shape == angles.shape and table.is_contiguous()
        assert_within_budget(table, oracle.float(), oracle)


def in_transformers(scaling: dict[str, Any], length: int, monkeypatch: pytest.MonkeyPatch, wide: bool) -> list[Tensor]:
    """The tables that transformers' own functions lead to, in float32 as it computes them or in float64."""
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    parameters = {**scaling, "rope_theta": 10000.0, "partial_rotary_factor": ROTARY_DIM / HEAD_DIM}
    limit = scaling.get("original_max_position_embeddings", length) if "dynamic" in scaling["rope_type"] else 8192
    config = neox.GPTNeoXConfig(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, max_position_embeddings=limit, rope_parameters=parameters
    )
    functions = {**rope.ROPE_INIT_FUNCTIONS, "default": neox.GPTNeoXRotaryEmbedding.compute_default_rope_parameters}
    with monkeypatch.context() as patch:
        if wide:  # its functions name these two
            patch.setattr(torch, "float", torch.float64)
            patch.setattr(torch, "float32", torch.float64)
        frequencies, attention = functions[scaling["rope_type"]](config, torch.device("cpu"), seq_len=length)
    assert frequencies.dtype == (torch.float64 if wide else torch.float32)
    angles = torch.arange(length, dtype=frequencies.dtype)[:, None] * frequencies
    return [angles.cos() * attention, angles.sin() * attention]


@pytest.mark.parametrize("length", [50, 64, 65, 400])
@pytest.mark.parametrize("case", SCALINGS)
def test_scalings_are_those_of_transformers(case: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = SCALINGS[case]
    theirs, wide = (in_transformers(scaling, length, monkeypatch, wide) for wide in (False, True))
    for ours, same, oracle in zip(rotary_tables(ROTARY_DIM, length, scaling=scaling), theirs, wide, strict=True):
        assert_within_budget(ours, same, oracle, case)
    if case not in ("default", "yarn, factor 1") and (case != "dynamic" or length > ORIGINAL):
        assert not torch.equal(
            rotary_tables(ROTARY_DIM, length, scaling=scaling)[1], rotary_tables(ROTARY_DIM, length)[1]
        )


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown type": ({"rope_type": "longrope", "factor": 2.0}, "rope_type.* must be one of .*, not 'longrope'"),
    "no type": ({"factor": 2.0}, "scaling must name its rope_type"),
    "no factor": ({"rope_type": "linear"}, "must have factor"),
    "no original": ({"rope_type": "dynamic", "factor": 2.0}, "original_max_position_embeddings"),
    "unknown parameter": (
        {"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0},
        "not factor, low_freq_factor",
    ),
    "misspelt parameter": ({**SCALINGS["yarn"], "beta_fats": 2}, "beta_fats"),
    "parameter of default": ({"rope_type": "default", "factor": 2.0}, "may have nothing more, not factor"),
    "partial llama3": ({"rope_type": "llama3", "factor": 2.0}, "high_freq_factor, low_freq_factor"),
}


@pytest.mark.parametrize("make", [lambda **k: rotary_tables(16, 32, **k), lambda **k: RotaryEmbedding(16, **k)])
def test_bad_parameters_raise(make: Any) -> None:
    for scaling, message in BAD.values():
        with pytest.raises(ValueError, match=message):
            make(scaling=scaling)
    for base in (1.0, 0.0, -2.0, math.nan):
        with pytest.raises(ValueError, match="base must be above 1"):
            make(base=base)


def test_bad_sizes_raise() -> None:
    for rotary_dim in (15, -2):
        with pytest.raises(ValueError, match="rotary_dim must be even"):
            rotary_tables(rotary_dim, 32)
        with pytest.raises(ValueError, match="rotary_dim must be even"):
            RotaryEmbedding(rotary_dim)
    for make in (rotary_tables, RotaryEmbedding):
        with pytest.raises(ValueError, match="max_position must not be negative"):
            make(16, -1)


def test_old_name_of_the_type_and_the_default_device() -> None:
    old, new = ({name: "linear", "factor": 2.0} for name in ("type", "rope_type"))
    assert torch.equal(rotary_tables(16, 9, scaling=old)[0], rotary_tables(16, 9, scaling=new)[0])
    with torch.device("meta"):
        assert rotary_tables(16, 9)[0].device.type == "meta"
        assert torch.equal(rotary_tables(16, 9, device="cpu")[1], rotary_tables(16, 9, device=torch.device("cpu"))[1])


def qk(seqlen: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seqlen)
    return tuple(torch.randn(2, seqlen, n, 40, generator=generator).to(dtype) for n in (3, 1))  # type: ignore[return-value]


def check(rope: Any, seqlen: int, table_length: int = 512, scaling: Any = None, **where: Any) -> None:
    """The module gives what the op gives by a table of that length."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k = qk(seqlen, dtype)
        expected = apply_rotary_qk(q, k, *rotary_tables(16, table_length, scaling=scaling), **where)
        assert all(torch.equal(a, b) for a, b in zip(rope(q, k, **where), expected, strict=True))


def test_module_grows() -> None:
    rope, cpu = RotaryEmbedding(16, max_position=8), torch.device("cpu")
    check(rope, 5)
    assert rope.tables(5, cpu)[0].shape == (8, 8)
    for seqlen in (9, 40, 5, 41, 8):
        check(rope, seqlen)
    same = rope.tables(41, cpu)
    assert same[0].shape[0] >= 41 and rope.tables(3, cpu)[0] is same[0], "tables are made once"
    check(RotaryEmbedding(16, max_position=0), 3)
    rope(*(x[:, :0] for x in qk(3)))


def test_positions_beyond_the_tables_grow_them() -> None:
    rope = RotaryEmbedding(16, max_position=4)
    check(rope, 5, seqlen_offsets=100)
    check(RotaryEmbedding(16, max_position=4), 5, position_ids=torch.tensor([200, 3, 0, 0, 7]))
    check(RotaryEmbedding(16, max_position=4), 5, seqlen_offsets=torch.tensor([0, 300], dtype=torch.int32))
    q, k = (x.flatten(0, 1) for x in qk(20))
    tables = rotary_tables(16, 512)
    cases: list[dict[str, Any]] = [
        {}, {"max_seqlen": 30}, {"seqlen_offsets": 50}, {"seqlen_offsets": 50, "max_seqlen": 30},
        {"seqlen_offsets": torch.tensor([90, 1])}, {"position_ids": torch.arange(40) * 5},
    ]  # fmt: skip
    for where in cases:
        where["cu_seqlens"] = torch.tensor([0, 30, 40])
        rope = RotaryEmbedding(16, max_position=4)
        expected = apply_rotary_qk(q, k, *tables, **where)
        assert all(torch.equal(a, b) for a, b in zip(rope(q, k, **where), expected, strict=True)), where


def test_dynamic_scaling_follows_the_length_and_returns() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
    rope = RotaryEmbedding(16, max_position=64, scaling=scaling)
    for seqlen in (10, 16, 17, 40, 41, 10, 40, 16):
        check(rope, seqlen, table_length=max(seqlen, 16), scaling=scaling)
    check(rope, 3, table_length=30, scaling=scaling, seqlen_offsets=27)
    check(rope, 3, table_length=26, scaling=scaling, position_ids=torch.tensor([25, 0, 1]))


def test_nothing_to_save_and_other_devices_and_dtypes_pass_by() -> None:
    rope = RotaryEmbedding(16)
    assert rope.state_dict() == {} and not [*rope.parameters(), *rope.buffers()]
    rope.load_state_dict({})
    q, k = qk(5)
    expected = rope(q, k)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.rope = rope  # type: ignore[assignment]
    for change in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.to("meta"),
        lambda m: m.to_empty(device="cpu"),
    ):
        change(model)
        assert rope.tables(5, q.device)[0].dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(rope(q, k), expected, strict=True))
    check(rope, 7)


def test_built_and_run_on_the_meta_device() -> None:
    with torch.device("meta"):
        rope = RotaryEmbedding(16, interleaved=True)
        out = rope(torch.empty(2, 5, 3, 40), torch.empty(2, 5, 1, 40))
    assert [(x.device.type, tuple(x.shape)) for x in out] == [("meta", (2, 5, 3, 40)), ("meta", (2, 5, 1, 40))]
    rope.to_empty(device="cpu")
    q, k = qk(5)
    expected = apply_rotary_qk(q, k, *rotary_tables(16, 5), interleaved=True)
    assert all(torch.equal(a, b) for a, b in zip(rope(q, k), expected, strict=True))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda rope: pickle.loads(pickle.dumps(rope)),
    "copy": copy.copy,
    "replica": lambda rope: rope._replicate_for_data_parallel(),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies(way: str) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    rope = RotaryEmbedding(16, max_position=8, scaling=scaling)
    check(rope, 12, scaling=scaling)
    other = COPIES[way](rope)
    check(other, 40, scaling=scaling)
    check(other, 4, scaling=scaling)
    check(rope, 60, scaling=scaling)
    assert repr(other) == repr(rope) and "linear" in repr(rope)
    assert way == "replica" or len(pickle.dumps(other)) < 4000, "tables were pickled"


def test_the_reference_is_what_transformers_computes() -> None:
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    x, (c, s) = qk(5)[0].double(), (table[None].double() for table in rotary_tables(16, 5))
    theirs, _ = neox.apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), c.repeat(1, 1, 2), s.repeat(1, 1, 2))
    assert_within_budget(reference.apply_rotary(x, c, s), theirs.transpose(1, 2), theirs.transpose(1, 2))
    theirs = gptj.apply_rotary_pos_emb(x[..., :16], s, c)
    assert_within_budget(reference.apply_rotary(x, c, s, interleaved=True)[..., :16], theirs, theirs)
