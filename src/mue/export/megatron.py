"""A plan for Megatron-Core: TransformerConfig, OptimizerConfig, overrides by parameter, and what its init methods leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mue.export.file_text import clipping, commonest, head, matching, table
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
from mue.plan.fold import fold, unfold
from mue.plan.plan import PlanData
from mue.shapes.block import Block

# Names and axes as in Megatron-Core 0.16. linear_fc1 holds gate and up, linear_fc2 is the down projection.
_M = "decoder.layers.*"
_EXPERT_UP = ("expert_gate", "expert_up")
_MEGATRON = (
    param("embedding.word_embeddings.weight", "embedding", IN_OUT),
    param(f"{_M}.self_attention.linear_qkv.weight", QKV),
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
_USE = """    config = TransformerConfig(**TRANSFORMER, **yours)          # arguments of the command line are in the comment below
    model = GPTModel(config, ...); init_(model)                 # in the model provider, before it is wrapped
    optimizer = get_megatron_optimizer(OptimizerConfig(**OPTIMIZER), [model], config_overrides())
    OptimizerParamScheduler(optimizer, **SCHEDULER, ...)        # it writes the groups' own lr and weight decay"""
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
    found = rows(plan, made)
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
        clipping(plan, "clip_grad"),
    ]
    text = head(plan, f"megatron-core 0.16, model {made.title}", _USE, cannot, _IMPORTS)
    return (
        text
        + table(plan, [*kept, *_last_stage(plan, found)])
        + _settings(plan, found, stds)
        + matching(every_row=False)
        + _CODE
        + _RANDOM
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
    shape = {**_shape(plan), **{m: f"init_method_normal({std!r})" for m, std in stds.items()}}
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
)
SCHEDULER = dict(init_lr=0.0, max_lr={lr!r}, min_lr={floor * lr!r}, start_wd={weight_decay!r}, end_wd={weight_decay!r})
"""


def _shape(plan: PlanData) -> dict[str, str]:
    """TransformerConfig's arguments, as code."""
    t = plan.target
    dense = _only(plan, "dense", [block for block in t.blocks if not block.is_moe])
    moe = _only(plan, "MoE", [block for block in t.blocks if block.is_moe])
    shape: dict[str, object] = {
        "num_layers": t.layers,
        "hidden_size": t.width,
        "num_attention_heads": t.num_heads,
        "num_query_groups": t.num_kv_heads,
        "kv_channels": t.head_dim,
        "softmax_scale": plan.attention_scale,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": t.gated,
        "ffn_hidden_size": dense.ffn if dense else moe.expert if moe else None,
    }
    code = {
        **{key: repr(value) for key, value in shape.items()},
        "activation_func": f"F.{'silu' if t.gated else 'gelu'}",
    }
    return code if moe is None else {**code, **{key: repr(value) for key, value in _experts(plan, moe).items()}}


def _experts(plan: PlanData, moe: Block) -> dict[str, object]:
    """TransformerConfig's arguments for experts; R is its top-k scaling factor, so it stays in the model."""
    if moe.router == "sigmoid" and (moe.active == 1 or not moe.normalize):
        raise ValueError(
            "Megatron-Core divides sigmoid scores by their sum, unless one expert is active: plan with softmax, or with"
            " normalised gates and at least two active experts"
        )
    if not moe.experts:
        raise ValueError("Megatron-Core has no layers with shared experts alone: plan them as dense ones (ffn)")
    freq = [int(block.is_moe) for block in plan.target.per_layer]
    shared = {"moe_shared_expert_intermediate_size": moe.shared_width} if moe.shared_experts else {}
    return {
        "moe_layer_freq": freq,
        "num_moe_experts": moe.experts,
        "moe_ffn_hidden_size": moe.expert,
        **shared,
        "moe_router_topk": moe.active,
        "moe_router_score_function": moe.router,
        "moe_router_pre_softmax": not moe.normalize,
        "moe_router_topk_scaling_factor": plan.multipliers.route[freq.index(1)],
    }


def _only(plan: PlanData, kind: str, blocks: Sequence[Block]) -> Block | None:
    """The one kind of block among them, whatever the number of layers."""
    kinds = {replace(block, layers=1) for block in blocks}
    if len(kinds) > 1:
        raise ValueError(
            f"the {kind} layers of {plan.target.name} differ, and Megatron-Core's TransformerConfig has one kind of them:"
            " plan with equal ones, or use another stack"
        )
    return kinds.pop() if kinds else None
