"""Stock models of diffusers at a tiny size: the role of every parameter against a table written by hand, or a refusal by name."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="stock diffusion transformers need the diffusers extra")

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_hidream_image import HiDreamImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

import mue
from mue.layouts.diffusers import stock
from mue.layouts.diffusers.config import image_config
from mue.layouts.diffusers.stock import describe_images
from mue.layouts.inspect import inspect
from mue.layouts.observe.describe import Description
from mue.layouts.of_model import placed

torch.set_num_threads(1)
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
SQUARE: dict[str, Any] = {**HEADS, "sample_size": 8}
TIME = {"timestep_embedder.linear_1": "time_embedding_in", "timestep_embedder.linear_2": "time_embedding_out"}
POOLED = {"text_embedder.linear_1": "condition_in", "text_embedder.linear_2": "condition_out"}
ATTENTION = {"to_q": "attention_q", "to_k": "attention_k", "to_v": "attention_v", "to_out.*": "attention_o"}
SECOND = {
    "add_q_proj": "attention_q",
    "add_k_proj": "attention_k",
    "add_v_proj": "attention_v",
    "to_add_out": "attention_o",
}
QK = {"norm_q": "qk_norm", "norm_k": "qk_norm"}
QK_SECOND = {"norm_added_q": "qk_norm", "norm_added_k": "qk_norm"}
FORWARD = {"net.*.proj": "ffn_up", "net.*": "ffn_down"}
GATED = {"w1": "gate", "w2": "down", "w3": "up"}


def under(prefix: str, *tables: dict[str, str], kind: str = "") -> dict[str, str]:
    """Rows of a table with what stands before their names, and before their roles."""
    return {f"{prefix}.{name}": f"{kind}{role}" for table in tables for name, role in table.items()}


PIXART: dict[str, str] = {
    "pos_embed.proj": "patch_embedding",
    **under("transformer_blocks.*.attn1", ATTENTION),
    **under("transformer_blocks.*.attn2", ATTENTION),
    **under("transformer_blocks.*.ff", FORWARD),
    **under("adaln_single.emb", TIME),
    "adaln_single.linear": "final_modulation",
    "proj_out": "head",
}
HIDREAM_ATTENTION = {
    **{name.removesuffix(".*"): role for name, role in ATTENTION.items()},
    "q_rms_norm": "qk_norm",
    "k_rms_norm": "qk_norm",
}
HIDREAM_EXPERTS: dict[str, str] = {
    **under("ff_i.experts.*", GATED, kind="expert_"),
    **under("ff_i.shared_experts", GATED, kind="shared_"),
    "ff_i.gate": "router",
}
# Of each model its keywords, and the role of every weight; all that is called bias is one.
MODELS: dict[str, tuple[Any, dict[str, Any], dict[str, str | None]]] = {
    "dit": (
        DiTTransformer2DModel,
        {**SQUARE, "num_embeds_ada_norm": 10},
        {
            "pos_embed.proj": "patch_embedding",
            **under("transformer_blocks.*.norm1.emb", TIME, {"class_embedder.embedding_table": "class_embedding"}),
            "transformer_blocks.*.norm1.linear": "modulation",
            **under("transformer_blocks.*.attn1", ATTENTION),
            **under("transformer_blocks.*.ff", FORWARD),
            "proj_out_1": "final_modulation",
            "proj_out_2": "head",
        },
    ),
    "pixart with captions": (
        PixArtTransformer2DModel,
        {**SQUARE, "caption_channels": 24, "cross_attention_dim": 32},
        {
            **PIXART,
            "caption_projection.linear_1": "condition_in",
            "caption_projection.linear_2": "condition_out",
        },
    ),
    "pixart with sizes": (
        PixArtTransformer2DModel,
        {},
        {
            **PIXART,
            **under("adaln_single.emb.resolution_embedder", {"linear_1": "condition_in", "linear_2": "condition_out"}),
            **under(
                "adaln_single.emb.aspect_ratio_embedder", {"linear_1": "condition_in", "linear_2": "condition_out"}
            ),
        },
    ),
    "sd3": (
        SD3Transformer2DModel,
        {
            **SQUARE,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 20,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
        },
        {
            "pos_embed.proj": "patch_embedding",
            **under("time_text_embed", TIME, POOLED),
            "context_embedder": "condition_in",
            "transformer_blocks.*.norm1.linear": "modulation",
            "transformer_blocks.*.norm1_context.linear": "modulation",
            **under("transformer_blocks.*.attn", ATTENTION, SECOND, QK, QK_SECOND),
            **under("transformer_blocks.*.attn2", ATTENTION, QK),
            **under("transformer_blocks.*.ff", FORWARD),
            **under("transformer_blocks.*.ff_context", FORWARD),
            "norm_out.linear": "final_modulation",
            "proj_out": "head",
        },
    ),
    "flux": (
        FluxTransformer2DModel,
        {
            **HEADS,
            "num_single_layers": 3,
            "in_channels": 12,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 20,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
        {
            **under("time_text_embed", TIME, POOLED),
            "time_text_embed.guidance_embedder.linear_1": "condition_in",
            "time_text_embed.guidance_embedder.linear_2": "condition_out",
            "context_embedder": "condition_in",
            "x_embedder": "patch_embedding",
            "transformer_blocks.*.norm1.linear": "modulation",
            "transformer_blocks.*.norm1_context.linear": "modulation",
            **under("transformer_blocks.*.attn", ATTENTION, SECOND, QK, QK_SECOND),
            **under("transformer_blocks.*.ff", FORWARD),
            **under("transformer_blocks.*.ff_context", FORWARD),
            "single_transformer_blocks.*.norm.linear": "modulation",
            **under("single_transformer_blocks.*.attn", {k: v for k, v in ATTENTION.items() if k != "to_out.*"}, QK),
            "single_transformer_blocks.*.proj_mlp": "ffn_up",
            "single_transformer_blocks.*.proj_out": None,
            "norm_out.linear": "final_modulation",
            "proj_out": "head",
        },
    ),
    "qwen": (
        QwenImageTransformer2DModel,
        {
            **HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
        {
            **under("time_text_embed", TIME),
            "txt_norm": "norm",
            "img_in": "patch_embedding",
            "txt_in": "condition_in",
            "transformer_blocks.*.img_mod.*": "modulation",
            "transformer_blocks.*.txt_mod.*": "modulation",
            **under("transformer_blocks.*.attn", ATTENTION, SECOND, QK, QK_SECOND),
            **under("transformer_blocks.*.img_mlp", FORWARD),
            **under("transformer_blocks.*.txt_mlp", FORWARD),
            "norm_out.linear": "final_modulation",
            "proj_out": "head",
        },
    ),
    "hidream": (
        HiDreamImageTransformer2DModel,
        {
            **HEADS,
            "num_single_layers": 1,
            "patch_size": 2,
            "in_channels": 4,
            "caption_channels": (24, 20),
            "text_emb_dim": 28,
            "llama_layers": (0, 1, 1),
            "axes_dims_rope": (8, 4, 4),
        },
        {
            **under("t_embedder", TIME),
            "p_embedder.pooled_embedder.linear_1": "condition_in",
            "p_embedder.pooled_embedder.linear_2": "condition_out",
            "x_embedder.proj": "patch_embedding",
            **under("double_stream_blocks.*.block.attn1", HIDREAM_ATTENTION),
            **under("double_stream_blocks.*.block.attn1", {f"{k}_t": v for k, v in HIDREAM_ATTENTION.items()}),
            **under("double_stream_blocks.*.block", HIDREAM_EXPERTS, {"adaLN_modulation.*": "modulation"}),
            **under("double_stream_blocks.*.block.ff_t", GATED, kind="ffn_"),
            **under("single_stream_blocks.*.block.attn1", HIDREAM_ATTENTION),
            **under("single_stream_blocks.*.block", HIDREAM_EXPERTS, {"adaLN_modulation.*": "modulation"}),
            "final_layer.linear": "head",
            "final_layer.adaLN_modulation.*": "final_modulation",
            "caption_projection.*.linear": "condition_in",
        },
    ),
}


@cache
def described(name: str) -> Description:
    kind, own, _ = MODELS[name]
    return describe_images(kind, image_config(kind, own))


def found(description: Description) -> dict[str, str | None]:
    return {
        p.pattern.removesuffix(".weight"): None if p.row is None else p.row.role
        for p in description.patterns
        if not p.pattern.endswith((".bias", "scale_shift_table"))
    }


@pytest.mark.parametrize("name", list(MODELS))
def test_every_parameter_has_the_role_of_the_table(name: str) -> None:
    assert found(described(name)) == MODELS[name][2]
    others = [p for p in described(name).patterns if p.pattern.endswith((".bias", "scale_shift_table"))]
    assert others and {p.row.role for p in others if p.row is not None} == {"bias"}
    assert all(p.row is not None for p in others)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "flux"])
def test_the_rows_place_every_parameter_of_the_model_itself(name: str) -> None:
    kind, own, _ = MODELS[name]
    with torch.device("meta"):
        model = kind(**own)
    rows = placed(model)
    assert len(rows) == len(list(model.parameters()))
    inputs = {p.name: p for p in rows if p.layout.role in ("condition_in", "patch_embedding", "time_embedding_in")}
    assert inputs and all(p.role in ("time_embedding_in", "patch_embedding") for p in inputs.values())


def test_without_a_look_at_what_is_read_the_tables_are_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: names and axes alone do not tell patches, captions and modulations apart."""
    kind, own, table = MODELS["sd3"]
    monkeypatch.setattr(stock, "module_flows", lambda *given: {})
    blind = found(describe_images(kind, image_config(kind, own)))
    lost = {name for name, role in table.items() if blind[name] != role}
    assert lost >= {"pos_embed.proj", "context_embedder", "transformer_blocks.*.norm1.linear", "norm_out.linear"}


def test_roles_follow_what_is_read_and_not_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told that captions are the image, and the image a caption, it has the two embedders the other way round."""
    kind, own, _ = MODELS["flux"]
    swapped = {"hidden_states": "text", "encoder_hidden_states": "image"}
    whole = stock.kinds_of
    monkeypatch.setattr(stock, "kinds_of", lambda given: {**whole(given), **swapped})
    roles = found(describe_images(kind, image_config(kind, own)))
    assert (roles["x_embedder"], roles["context_embedder"]) == ("condition_in", "patch_embedding")


def test_one_matrix_that_is_o_and_down_is_refused_with_what_to_do() -> None:
    (refused,) = described("flux").undecided
    assert refused.pattern == "single_transformer_blocks.*.proj_out.weight"
    with pytest.raises(ValueError, match=r"proj_out\.weight.*output projection and .*down projection.*Cut it into two"):
        described("flux").layout()


@pytest.mark.parametrize("ffn", [256, 512])
def test_why_it_is_refused_its_two_rows_agree_only_while_the_expansion_does(ffn: int) -> None:
    image = mue.Image(size=8, channels=4, patch=2, classes=10)
    base, target = (mue.Dense(width=w, ffn=h, layers=2, head_dim=16, image=image) for w, h in ((32, 128), (64, ffn)))
    plan = mue.transfer(base, target, mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.02))
    o, down = (plan.role(role, 0).values for role in ("attention_o", "ffn_down"))
    assert (o == down and set(plan.multipliers.output) == {1.0}) == (ffn == 4 * 64)


def test_gates_and_ups_in_one_matrix_are_refused_by_name() -> None:
    own = {**SQUARE, "num_embeds_ada_norm": 10, "activation_fn": "geglu"}
    (refused,) = describe_images(DiTTransformer2DModel, image_config(DiTTransformer2DModel, own)).undecided
    assert refused.pattern == "transformer_blocks.*.ff.net.*.proj.weight" and "cut into 2" in refused.how


def test_of_two_matrices_that_go_up_none_is_decided_where_one_is_not() -> None:
    """AuraFlow's ``linear_1`` is the gate, though other models call their up projection so."""
    kind = pytest.importorskip("diffusers.models.transformers.auraflow_transformer_2d").AuraFlowTransformer2DModel
    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "num_mmdit_layers": 1, "num_single_dit_layers": 1}
    config = image_config(kind, {**sizes, "joint_attention_dim": 24, "caption_projection_dim": 32, "sample_size": 8})
    roles = found(describe_images(kind, config))
    block = "single_transformer_blocks.*.ff"
    assert [roles[f"{block}.{name}"] for name in ("linear_1", "linear_2", "out_projection")] == [None, None, "ffn_down"]
    own = [mue.Layout(f"*.*.ff{end}.linear_2.weight", "ffn_up", ("out", "in")) for end in ("", "_context")]
    own += [mue.Layout("single_transformer_blocks.*.ff.linear_1.weight", "ffn_gate", ("out", "in"))]
    settled = found(describe_images(kind, config, own))
    assert (settled[f"{block}.linear_1"], settled[f"{block}.linear_2"]) == ("ffn_gate", "ffn_up")


def dit(**numbers: int) -> DiTTransformer2DModel:
    with torch.device("meta"):
        return DiTTransformer2DModel(**SQUARE, num_embeds_ada_norm=10, **numbers)


def test_fan_ins_of_a_dit_are_what_is_summed_over() -> None:
    fan_in = {p.name: p.fan_in for p in placed(dit())}
    block = "transformer_blocks.1"
    wanted = {
        "pos_embed.proj.weight": 4 * 2 * 2,
        f"{block}.norm1.emb.timestep_embedder.linear_1.weight": 256,
        f"{block}.norm1.emb.class_embedder.embedding_table.weight": 11,
        f"{block}.norm1.linear.weight": 32,
        f"{block}.ff.net.0.proj.weight": 32,
        f"{block}.ff.net.2.weight": 128,
    }
    assert {n: fan_in[n] for n in wanted} == wanted


def test_a_dit_is_read_as_the_base_that_it_is_and_takes_its_plan() -> None:
    model = DiTTransformer2DModel(**SQUARE, num_embeds_ada_norm=10)
    shape = mue.Dense.of(model)
    image = mue.Image(size=8, channels=4, patch=2, classes=10)
    assert shape == mue.Dense(width=32, ffn=128, layers=2, heads=2, kv_heads=2, head_dim=16, gated=False, image=image)
    plan = mue.fold.fold(mue.transfer(shape, shape, mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.02)))
    plan.init_(model)
    assert not model.transformer_blocks[0].norm1.linear.weight.any()
    assert model.proj_out_2.weight.any() and not model.proj_out_2.bias.any()


@pytest.mark.parametrize("name", ["pixart with sizes", "sd3", "hidream"])
def test_a_model_without_classes_has_no_shape_and_says_so(name: str) -> None:
    kind, own, _ = MODELS[name]
    with torch.device("meta"):
        model = kind(**own)
    seen = inspect(model)
    assert not seen.undecided and seen.shape is None and "no table of classes" in seen.no_shape
    assert (seen.routing is None) == (name != "hidream")
    if seen.routing is not None:
        assert seen.routing.active == 2


def test_hidream_is_built_from_the_published_numbers_where_its_class_has_none() -> None:
    config = image_config(HiDreamImageTransformer2DModel, {})
    assert (config.hidden_size, config.patch_size, config.num_routed_experts) == (2560, 2, 4)


def test_an_unknown_keyword_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"knows no 'num_layer'.*num_layers"):
        image_config(DiTTransformer2DModel, {"num_layer": 2})


def test_a_forward_that_needs_what_nobody_described_is_refused_with_its_name() -> None:
    class Judged(DiTTransformer2DModel):
        def forward(self, hidden_states, judge, timestep=None, class_labels=None):  # type: ignore[no-untyped-def]
            return super().forward(hidden_states * judge, timestep, class_labels)

    with pytest.raises(ValueError, match="Judged needs judge"):
        describe_images(Judged, image_config(Judged, MODELS["dit"][1]))
