"""A plan for Megatron-Core: TransformerConfig, OptimizerConfig, overrides by parameter, and what its init methods leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mue.export.file_text import clipping, commonest, head, matching, table
from mue.export.megatron_config import transformer_config
from mue.export.muon import is_muon, moved, refuse_fused, refuse_stacked
from mue.export.registry import STACKS
from mue.export.rows import ExportRow, rows
from mue.export.skeleton import NativeStack
from mue.export.stack_model import (
    IN_OUT,
    KV,
    QKV,
    VECTOR,
    StackModel,
    bias_params,
    norm_params,
    param,
)
from mue.layouts.layout import HEADS
from mue.plan.fold import fold, unfold
from mue.plan.plan import PlanData
from mue.rules.optimizers import BOTH

# Names and axes as in Megatron-Core 0.16. linear_fc1 holds gate and up, linear_fc2 is the down projection.
_M = "decoder.layers.*"
_EXPERT_UP = ("expert_gate", "expert_up")
_MEGATRON = (
    param("embedding.word_embeddings.weight", "embedding", IN_OUT),
    param(f"{_M}.self_attention.linear_qkv.weight", QKV, order=HEADS),
    *norm_params(f"{_M}.self_attention", ("q_layernorm", "k_layernorm"), "qk_norm"),
    param(f"{_M}.self_attention.linear_proj.weight", "attention_o"),
    param(f"{_M}.mlp.linear_fc1.weight", ("ffn_gate", "ffn_up")),
    param(f"{_M}.mlp.linear_fc2.weight", "ffn_down"),
    param(f"{_M}.mlp.router.weight", "router"),
    param(f"{_M}.mlp.shared_experts.linear_fc1.weight", ("shared_gate", "shared_up")),
    param(f"{_M}.mlp.shared_experts.linear_fc2.weight", "shared_down"),
    param("decoder.final_layernorm.weight", "final_norm", VECTOR),
    param("output_layer.weight", "head"),
)
_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
_LAYERNORMS = ("input_layernorm", "pre_mlp_layernorm", "self_attention.q_layernorm", "self_attention.k_layernorm")
MEGATRON = NativeStack(
    "megatron",
    {
        "te": StackModel(
            "Transformer Engine's layers: norms inside the linear layers after them, grouped experts",
            (*_MEGATRON, param(f"{_M}.self_attention.linear_qkv.layer_norm_weight", "norm", VECTOR)),
            dense=(param(f"{_M}.mlp.linear_fc1.layer_norm_weight", "norm", VECTOR),),
            moe=(
                *norm_params(_M, ("pre_mlp_layernorm",)),
                param(f"{_M}.mlp.experts.linear_fc1.weight*", _EXPERT_UP),
                param(f"{_M}.mlp.experts.linear_fc2.weight*", "expert_down"),
            ),
        ),
        "local": StackModel(
            "Megatron's own layers (get_gpt_layer_local_spec), experts one by one",
            (*_MEGATRON, *norm_params(_M, ("input_layernorm", "pre_mlp_layernorm"))),
            moe=(
                param(f"{_M}.mlp.experts.local_experts.*.linear_fc1.weight", _EXPERT_UP),
                param(f"{_M}.mlp.experts.local_experts.*.linear_fc2.weight", "expert_down"),
            ),
        ),
    },
    others=(
        param("embedding.position_embeddings.weight", "position", IN_OUT),
        param(f"{_M}.mlp.shared_experts.gate_weight", "router"),
        *bias_params(_M, (*_LINEARS, *_LAYERNORMS)),
        *(param(f"{_M}.{x}.layer_norm_bias", "bias", VECTOR) for x in ("self_attention.linear_qkv", "mlp.linear_fc1")),
        *bias_params(_M, (f"mlp.experts.local_experts.*.linear_fc{i}" for i in (1, 2))),
        param("decoder.final_layernorm.bias", "bias", VECTOR),
        # GroupedMLP: viewed as (experts, in, out) and as (experts, in, out)
        param(f"{_M}.mlp.experts.weight1", _EXPERT_UP, ("in", "expert*out")),
        param(f"{_M}.mlp.experts.weight2", "expert_down", ("expert*in", "out")),
        # latent attention
        *(param(f"{_M}.self_attention.linear_q_{w}.weight", "attention_q") for w in ("proj", "down_proj", "up_proj")),
        *(param(f"{_M}.self_attention.linear_kv_{w}.weight", KV) for w in ("down_proj", "up_proj")),
        *norm_params(f"{_M}.self_attention", ("q_layernorm", "kv_layernorm")),
        *(param(f"{_M}.self_attention.linear_{x}_up_proj.layer_norm_weight", "norm", VECTOR) for x in ("q", "kv")),
    ),
)

_CODE = '''

def config_overrides():
    """For get_megatron_optimizer. Rows with OPTIMIZER's own values need none (its log shows the lr of such a group).

    A checkpoint finds its groups again by wd_mult, lr_mult, is_expert_parallel and is_decoupled_lr alone, and the scheduler
    reads only the first: so each setting has a number of its own in the last, or resuming would mix up groups.
    """
    numbers, found = {BASE: 0}, {}
    for pattern, lr, weight_decay, eps, *_ in ROWS:
        number = numbers.setdefault((lr, weight_decay, eps), len(numbers))
        if number:
            named = ParamWithNamePredicate(name=pattern, fn=lambda _, name, row=pattern: bool(re.fullmatch(row, _name(name))))
            found[ParamKey(with_name_predicate=named)] = ParamGroupOverride(
                max_lr=lr,
                min_lr=FLOOR * lr,
                start_wd=weight_decay,
                end_wd=weight_decay,
                eps=eps,
                is_decoupled_lr=number,
            )
    return found
'''
_RANDOM = '''

def _draws(parameter):
    """The random state that Megatron would draw this parameter in: of its tensor-parallel and expert-parallel rank."""
    if not parameter.is_cuda:
        return nullcontext()
    if not getattr(parameter, "allreduce", True):
        return get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name())
    return get_cuda_rng_tracker().fork() if getattr(parameter, "tensor_model_parallel", False) else nullcontext()


@torch.no_grad()
def init_(model):
    """Draw what the three init methods of TRANSFORMER cannot; the other parameters keep their start."""
    for i, parameter in _rows(model):
        if parameter.is_meta:
            raise ValueError("a model on the meta device has no values to draw: model.to_empty(device=...) first")
        std, constant = ROWS[i][4:6]
        if std is not None:
            with _draws(parameter):
                parameter.normal_(0.0, std)
        elif constant is not None:
            parameter.fill_(constant)
'''
# Its Muon moves every parameter of two axes without this mark, which Megatron-Core gives to embedding and head, and reads nowhere
# else but for the decoupled lr, which this file does not use (megatron.core.optimizer.muon, get_megatron_muon_optimizer).
_MUON = '''

def muon_optimizer(model_chunks, **more):
    """Muon and AdamW, chained. Routers are marked as embeddings are: its Muon would take them, as every matrix without the mark."""
    for chunk in model_chunks:
        for name, parameter in chunk.named_parameters():
            if parameter.dim() == 2 and not any(re.fullmatch(pattern, _name(name)) for pattern in MUON):
                parameter.is_embedding_or_output_parameter = True
    return get_megatron_muon_optimizer(OptimizerConfig(**OPTIMIZER), model_chunks, config_overrides(), **more)
'''
_USE = """    config = TransformerConfig(**TRANSFORMER, **yours)          # arguments of the command line are in the comment below
    model = GPTModel(config, ...); init_(model)                 # in the model provider, before it is wrapped
    optimizer = MAKE
    OptimizerParamScheduler(optimizer, **SCHEDULER, ...)        # it writes the groups' own lr and weight decay"""
_MAKE = {
    "adamw": "get_megatron_optimizer(OptimizerConfig(**OPTIMIZER), [model], config_overrides())",
    "muon": "muon_optimizer([model])                         # in the place of get_megatron_optimizer",
}
# Its three scales, with the factor beside them (emerging_optimizers 0.1, get_muon_scale_factor).
_SCALES = {"spectral": ("unit_rms_norm", 1.0), "keller": ("shape_scaling", 1.0), "match-rms": ("spectral", 0.2)}
_IMPORTS = (
    "re",
    "from contextlib import nullcontext",
    "",
    "torch",
    "from torch.nn import functional as F",
    "from megatron.core.optimizer import ParamKey, ParamWithNamePredicate",
    "from megatron.core.optimizer_param_scheduler import ParamGroupOverride",
    "from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name",
    "from megatron.core.utils import init_method_normal",
)


@STACKS.register("megatron", place=5)
def megatron(plan: PlanData, model: Any) -> str:
    """The file's text. R stays in the model: TransformerConfig has a scaling factor for it.

    Raises:
        ValueError: routers that Megatron-Core does not have; layers that differ in more than dense or with experts.
    """
    # R stays: moe_router_topk_scaling_factor is its home
    plan = fold(unfold(plan), "model")
    made = MEGATRON.model(plan.target, model)
    found, muon = rows(plan, made, optimizers=BOTH), is_muon(plan)
    if muon:
        _check_muon(found)
    stds = {
        method: _std(found, method) for method in ("init_method", "output_layer_init_method", "embedding_init_method")
    }
    # Megatron draws by three methods; the std that most matrices of a method have is left to it, the rest is drawn anew. A model
    # of somebody's own need not ask those methods.
    left = made.stacks_own
    drawn = [row for row in found if row.std is not None and not (left and row.std == stds[_method(row)])]
    # gains of 1 and biases of 0 are what Megatron starts with by itself
    kept = [
        row if row in drawn else replace(row, std=None, constant=None if row.constant in (0.0, 1.0) else row.constant)
        for row in found
    ]
    cannot = [
        "init by role: init_method, output_layer_init_method and embedding_init_method are one each; init_ draws the rest "
        f"({', '.join(dict.fromkeys(row.roles for row in drawn)) or 'here nothing'})",
        "groups by name on the command line: pass config_overrides() to get_megatron_optimizer; the standard overrides (no decay "
        "of vectors) may stay beside them",
        "warmup must start at 0 (lr_warmup_init is one number for all groups)",
        *_pipeline_line(found),
        *([_EXPERT_GROUPS] if len({row.setting for row in moved(found) if "expert_" in row.roles}) > 1 else []),
        clipping(plan, "clip_grad"),
    ]
    use, imports = _USE.replace("MAKE", _MAKE[plan.tuned.optimizer]), _IMPORTS + (_MUON_IMPORTS if muon else ())
    text = head(plan, f"megatron-core 0.16, model {made.title}", use, cannot, imports)
    return (
        text
        + table(plan, [*kept, *_last_stage(plan, found)])
        + _settings(plan, found, stds)
        + matching(every_row=False)
        + _CODE
        + (_MUON if muon else "")
        + _RANDOM
    )


def _check_muon(found: Sequence[ExportRow]) -> None:
    """Refuse what its Muon takes as one matrix: it takes apart q, k and v alone, group by group of heads."""
    qkv = [f"{_M}.self_attention.linear_qkv.weight"]
    refuse_stacked(
        found,
        "Megatron-Core's Muon takes it as one matrix",
        'the models "te" and "local" have one tensor for each expert',
    )
    refuse_fused(found, "Megatron-Core 0.16", 'plan without a gate (gated = false), or export("torch")', qkv)


_MUON_IMPORTS = (
    "from megatron.core.optimizer import OptimizerConfig",
    "from megatron.core.optimizer.muon import get_megatron_muon_optimizer  # needs emerging_optimizers 0.1",
)
_EXPERT_GROUPS = (
    "the gradient norm with expert parallelism: get_megatron_muon_optimizer removes groups of experts from the list that it iterates"
    " over, so one behind another may stay beside the dense matrices, and clip_grad then sums its gradients over too few ranks"
)


def _method(row: ExportRow) -> str:
    """Which of the three init methods Megatron-Core gives a tensor to."""
    last = row.pattern.removesuffix(".weight").rpartition(".")[2]
    if row.roles in ("embedding", "position"):
        return "embedding_init_method"
    return (
        "output_layer_init_method"
        if last in ("linear_proj", "linear_fc2", "weight2") or "fc2" in row.pattern
        else "init_method"
    )


def _std(found: Sequence[ExportRow], method: str) -> float:
    stds = [row.std for row in found if row.std is not None and _method(row) == method]
    if not stds:
        raise ValueError(
            f"no matrix of this model is one that Megatron-Core draws by its {method} (it goes by names like linear_proj and"
            ' linear_fc2): give a model that it built, one of its own by name, or export("torch") for a model of yours'
        )
    return Counter(stds).most_common(1)[0][0]


def _pipeline_line(found: Sequence[ExportRow]) -> list[str]:
    if all(row.layers is None for row in found):
        return []
    return [
        "pipeline stages: they count their layers from 0, and these patterns name layers of the whole model; write the numbers "
        "of a stage's own layers into them"
    ]


def _last_stage(plan: PlanData, found: Sequence[ExportRow]) -> list[ExportRow]:
    """The tied embedding's copy on the last pipeline stage, which is given the first's start."""
    if not plan.target.tied:
        return []
    row = next(row for row in found if row.pattern == "embedding.word_embeddings.weight")
    return [replace(row, pattern="output_layer.weight", roles="embedding, on the last stage", std=None)]


def _settings(plan: PlanData, found: Sequence[ExportRow], stds: dict[str, float]) -> str:
    """The three dictionaries as code, and as a comment what of them the command line can say."""
    base, floor = commonest(found), plan.tuned.floor
    shape = {**transformer_config(plan), **{m: f"init_method_normal({std!r})" for m, std in stds.items()}}
    transformer = "".join(f"    {key}={value},\n" for key, value in shape.items())
    lr, weight_decay, eps = base.setting
    flags = {
        "lr": lr,
        "min-lr": floor * lr,
        "lr-warmup-init": 0.0,
        "weight-decay": weight_decay,
        "adam-beta1": plan.betas[0],
        "adam-beta2": plan.betas[1],
        "adam-eps": eps,
        "clip-grad": plan.tuned.clip or 0.0,
        "init-method-std": stds["init_method"],
        "moe-router-topk-scaling-factor": shape.get("moe_router_topk_scaling_factor"),
    }
    muon = [row.regex for row in moved(found)]
    line = " ".join(f"--{flag} {value}" for flag, value in flags.items() if value is not None)
    return f"""# {line}
BASE, FLOOR = {base.setting!r}, {floor!r}
TRANSFORMER = dict(
{transformer})
OPTIMIZER = dict(
    optimizer="adam",
    lr={lr!r},
    min_lr={floor * lr!r},
    weight_decay={weight_decay!r},
    adam_beta1={plan.betas[0]!r},
    adam_beta2={plan.betas[1]!r},
    adam_eps={eps!r},
    clip_grad={plan.tuned.clip or 0.0!r},
{_muon_settings(plan) if muon else ""})
SCHEDULER = dict(init_lr=0.0, max_lr={lr!r}, min_lr={floor * lr!r}, start_wd={weight_decay!r}, end_wd={weight_decay!r})
{f"MUON = {muon!r}" + chr(10) if muon else ""}"""


def _muon_settings(plan: PlanData) -> str:
    """Arguments of OptimizerConfig for Muon, as code."""
    mode, extra = _SCALES[plan.tuned.update_scale]
    settings = {
        "muon_momentum": plan.momentum,
        "muon_use_nesterov": True,
        "muon_scale_mode": mode,
        "muon_extra_scale_factor": extra,
        "muon_num_ns_steps": 5,
        "muon_split_qkv": True,
        "muon_tp_mode": "duplicated",  # "blockwise", the default, takes each tensor-parallel shard as a matrix of its own
    }
    return "".join(f"    {key}={value!r},\n" for key, value in settings.items())
