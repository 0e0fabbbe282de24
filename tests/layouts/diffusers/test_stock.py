"""Stock models of diffusers at a tiny size: every parameter has a role, or is refused by name."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="stock diffusion transformers need the diffusers extra")

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

import mue
from mue.layouts.diffusers.stock import describe_images, image_config
from mue.layouts.observe.describe import Description
from mue.layouts.of_model import placed

torch.set_num_threads(1)
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8}


@cache
def pixart() -> Description:
    own = {**HEADS, "caption_channels": 24, "cross_attention_dim": 32}
    return describe_images(PixArtTransformer2DModel, image_config(PixArtTransformer2DModel, own))


def dit(**numbers: int) -> DiTTransformer2DModel:
    with torch.device("meta"):
        return DiTTransformer2DModel(**HEADS, num_embeds_ada_norm=10, **numbers)


def test_every_parameter_of_a_dit_has_the_role_that_its_axes_show() -> None:
    found = {p.name: p for p in placed(dit())}
    block = "transformer_blocks.1"
    wanted = {
        "pos_embed.proj.weight": ("patch_embedding", 4 * 2 * 2),
        f"{block}.norm1.emb.timestep_embedder.linear_1.weight": ("time_embedding_in", 256),
        f"{block}.norm1.emb.timestep_embedder.linear_2.weight": ("time_embedding_out", 32),
        f"{block}.norm1.emb.class_embedder.embedding_table.weight": ("class_embedding", 11),
        f"{block}.norm1.linear.weight": ("modulation", 32),
        f"{block}.attn1.to_q.weight": ("attention_q", 32),
        f"{block}.attn1.to_k.weight": ("attention_k", 32),
        f"{block}.attn1.to_v.weight": ("attention_v", 32),
        f"{block}.attn1.to_out.0.weight": ("attention_o", 32),
        f"{block}.ff.net.0.proj.weight": ("ffn_up", 32),
        f"{block}.ff.net.2.weight": ("ffn_down", 128),
        "proj_out_1.weight": ("final_modulation", 32),
        "proj_out_2.weight": ("head", 32),
    }
    assert {n: (found[n].role, found[n].fan_in) for n in wanted} == wanted
    assert {p.role for n, p in found.items() if n.endswith("bias")} == {"bias"}


def test_a_dit_is_read_as_the_base_that_it_is_and_takes_its_plan() -> None:
    model = DiTTransformer2DModel(**HEADS, num_embeds_ada_norm=10)
    shape = mue.Dense.of(model)
    image = mue.Image(size=8, channels=4, patch=2, classes=10)
    assert shape == mue.Dense(width=32, ffn=128, layers=2, heads=2, kv_heads=2, head_dim=16, gated=False, image=image)
    plan = mue.fold.fold(mue.transfer(shape, shape, mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.02)))
    plan.init_(model)
    assert not model.transformer_blocks[0].norm1.linear.weight.any()
    assert model.proj_out_2.weight.any()


def test_what_reads_captions_is_refused_by_name() -> None:
    refused = {p.pattern for p in pixart().undecided}
    assert refused and all("caption_projection" in name for name in refused)
    with pytest.raises(ValueError, match=r"caption_projection\.linear_1\.weight.*other than time and class"):
        pixart().layout()


def test_a_model_of_two_streams_is_refused_whole_and_by_name() -> None:
    own = {**HEADS, "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 20}
    with pytest.raises(ValueError, match="SD3Transformer2DModelConfig could not be built and run"):
        describe_images(SD3Transformer2DModel, image_config(SD3Transformer2DModel, own))


def test_sizes_of_pictures_are_refused_and_captions_that_are_read_as_they_are_need_no_role() -> None:
    found = describe_images(PixArtTransformer2DModel, image_config(PixArtTransformer2DModel, {}))
    assert {p.pattern.split(".")[2] for p in found.undecided} == {"resolution_embedder", "aspect_ratio_embedder"}


def test_an_unknown_keyword_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"knows no 'num_layer'.*num_layers"):
        image_config(DiTTransformer2DModel, {"num_layer": 2})
