"""Training configs of mLoRA and MoE-PEFT (JSON), as this program's settings.

    {"cutoff_len": 512, "save_step": 1000, "lora": [{"name": "a", "task_name": "arc-e", ...}]}

    python train.py --config theirs.json model.base=DIR data.dir=DIR run.dir=DIR

They name neither the base model nor a folder, and come with the ways of the published training:
loss on prompt and padding too, no EOS, the tail of a long text cut, one shuffle, no clipping, and
the published evaluation. `train_lora_simultaneously_num` is run.together: the other keys of how
adapters share a batch do not matter.
"""

from mixlora.adapter_config import LEGACY_STRATEGIES, LEGACY_TARGETS, modern
from mixlora.config import Located
from mixlora.errors import InputError, did_you_mean

TOGETHER_KEY = "train_lora_simultaneously_num"
SHARING_KEYS = set(
    "train_strategy train_lora_candidate_num inference_lora_simultaneously_num "
    "eval_lora_simultaneously_num eval_rollback_retrying_steps".split()
)
# an adapter's key -> where it stands here; one without a dot is of `adapter`
KEYS = {
    "num_epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "micro_batch_size": "train.micro_batch_size",
    "evaluate_batch_size": "eval.batch_size",
    "lr": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "scheduler_type": "optim.schedule",
    "group_by_length": "data.group_by_length",
} | {
    key: f"adapter.{key}"
    for key in (
        "r lora_alpha lora_dropout bias peft_type target_modules use_dora use_rslora lora_init "
        "loraplus_lr_ratio routing_strategy num_experts top_k top_p temperature act_fn router_loss "
        "router_aux_loss_coef router_init_range jitter_noise router_z_loss_coef expert_capacity "
        "ffn_dropout expert_lora"
    ).split()
}
# keys that must have this value (or none), and what to do instead
FIXED = {
    "optim": ("adamw", "there is only AdamW"),
    "momentum": (0, "there is only AdamW"),
    "warmup_steps": (0, "upstream reads it nowhere: set optim.warmup_steps"),
    "warmup_ratio": (0, "set optim.warmup_steps"),
    "evaluate_steps": (None, "evaluation is before and after training"),
    "sparse_step": (None, "upstream reads it nowhere: every feed-forward is a mixture"),
}
PUBLISHED = {
    "data.loss_on": "padded_text",
    "data.append_eos": False,
    "data.truncate": "end",
    "data.reshuffle": False,
    "optim.schedule": "constant",
    "optim.max_grad_norm": 0.0,
    "eval.protocol": "mixlora",
}


def translate(tree: Located) -> Located:
    """A config of theirs as one of ours; any other config is returned as it is."""
    if not isinstance(tree.value, dict) or "lora" not in tree.value:
        return tree
    top = dict(tree.value)
    adapters = top.pop("lora")
    if not isinstance(adapters.value, list) or not adapters.value:
        raise InputError(f"{adapters.where}: lora must be a list of at least one adapter")
    cutoff, save_step = top.pop("cutoff_len", None), top.pop("save_step", None)
    together = top.pop(TOGETHER_KEY, None)
    for key, node in top.items():
        if key not in SHARING_KEYS:
            known = {*SHARING_KEYS, TOGETHER_KEY, "cutoff_len", "save_step", "lora"}
            hint = did_you_mean(key, known)
            raise InputError(f"{node.where}: unknown key '{key}'{hint}")
    runs = [_adapter(node, cutoff) for node in adapters.value]
    train = runs[0].value.get("train", Located({}, adapters.where))
    ours = {"adapters": Located(runs, adapters.where), "train": train}
    if save_step is not None:
        _put(ours, "run.save_every_steps", _steps(save_step, adapters.value[0]))
    if together is not None:
        _put(ours, "run.together", together)
    return Located(ours, tree.where)


def _adapter(node: Located, cutoff: Located | None) -> Located:
    if not isinstance(node.value, dict):
        raise InputError(f"{node.where}: an adapter of lora must be a mapping")
    theirs, ours = dict(node.value), {}
    for key, value in PUBLISHED.items():
        _put(ours, key, Located(value, node.where))
    if cutoff is not None:
        _put(ours, "train.max_seq_len", cutoff)
    ours["name"] = theirs.pop("name", Located("default", node.where))
    _data(ours, theirs, node.where)
    for key, value in theirs.items():
        if key in FIXED:
            wanted, instead = FIXED[key]
            if value.value is not None and value.value != wanted:
                raise InputError(f"{value.where}: {key} = {value.value!r}: {instead}")
        elif key in KEYS:
            _put(ours, KEYS[key], _modern(key, value))
        else:
            hint = did_you_mean(key, {*KEYS, *FIXED, "name", "task_name", "data", "prompt"})
            raise InputError(f"{value.where}: unknown key 'lora.{key}'{hint}")
    return Located(ours, node.where)


def _data(ours: dict, theirs: dict, where: str) -> None:
    """Tasks by name (a;b;c), or a file of instructions."""
    task, file = theirs.pop("task_name", None), theirs.pop("data", None)
    prompt = theirs.pop("prompt", None)
    name = task.value if task is not None else None
    if name in (None, "", "casual"):
        if file is None or not file.value:
            raise InputError(f"{where}: an adapter needs data, or a task_name")
        template = prompt.value if prompt is not None and prompt.value else "moe_peft"
        source = {"path": file, "template": Located(template, where)}
        _put(ours, "data.files", Located([Located(source, file.where)], file.where))
        return
    if file is not None and file.value:
        raise InputError(f"{file.where}: data = {file.value!r}: tasks are read from data.dir")
    names = name.split(";") if isinstance(name, str) else [name]
    tasks = Located([Located(x, task.where) for x in names], task.where)
    _put(ours, "data.tasks", tasks)
    _put(ours, "eval.tasks", tasks)


def _modern(key: str, node: Located) -> Located:
    """Older spellings of strategies and projections, and projections as a mapping."""
    if key == "routing_strategy":
        return Located(modern(node.value, LEGACY_STRATEGIES), node.where)
    if key == "target_modules" and isinstance(node.value, dict):
        chosen = [name for name, on in node.value.items() if on.value is True]
        targets = [Located(modern(name, LEGACY_TARGETS), node.where) for name in chosen]
        return Located(targets, node.where)
    return node


def _steps(save_step: Located, adapter: Located) -> Located:
    """Their steps are forwards; ours are the optimizer's."""
    batch, micro = (adapter.value.get(key) for key in ("batch_size", "micro_batch_size"))
    sizes = [node.value if node is not None else None for node in (batch, micro)]
    if not isinstance(save_step.value, int) or not all(isinstance(x, int) and x > 0 for x in sizes):
        return save_step
    return Located(max(1, save_step.value * sizes[1] // sizes[0]), save_step.where)


def _put(tree: dict, path: str, node: Located) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, Located({}, node.where)).value
    tree[last] = node
