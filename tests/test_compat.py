"""Each private name of another library in `fastft/compat` still is what fastft takes it for; each failure names the
library, its version and the symbol. conftest.py puts this file first."""

import ast
import importlib
import inspect
import weakref
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import nn

pytestmark = [pytest.mark.oldest, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parent.parent


def holds(symbol: str, claim: object, library: str = "torch") -> None:
    """Fail by name: library, its version, symbol."""
    assert claim, (
        f"{library} {importlib.import_module(library).__version__}: {symbol} is not what fastft/compat takes it for"
    )


# Are they there?

NAMES = [
    "torch._C.DisableTorchFunctionSubclass",
    "torch._C._autograd._top_saved_tensors_default_hooks",
    "torch._C._current_graph_task_id",
    "torch._C._will_engine_execute_node",
    "torch._C._len_torch_function_stack",
    "torch.autograd.forward_ad._current_level",
    "torch.Tensor._make_wrapper_subclass",
    "torch.Tensor._make_subclass",
    "torch.Tensor._version",
    "torch.Tensor._base",
    "torch.Tensor._is_view",
    "torch.Tensor._backward_hooks",
    "torch.Tensor._post_accumulate_grad_hooks",
    "torch._subclasses.fake_tensor.DataDependentOutputException",
    "torch._subclasses.fake_tensor.DynamicOutputShapeException",
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch._subclasses.fake_tensor.in_kernel_invocation_manager",
    "torch._subclasses.fake_tensor.unset_fake_temporarily",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._python_dispatch._disable_current_modes",
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack",
    "torch.utils._pytree.tree_flatten",
    "torch.utils._pytree.tree_leaves",
    "torch.utils._pytree.tree_map_only",
    "torch.utils._pytree.tree_unflatten",
    "torch.nn.modules.dropout._DropoutNd",
    "torch.nn.parallel.distributed._DDPSink",
    "torch.distributed._composable_state._module_state_mapping",
    "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState._pre_backward",
    "torch.testing._internal.distributed.fake_pg.FakeStore",
    "torch.ops.aten._softmax.default",
    "torch.ops.aten._log_softmax.default",
    "torch.ops.aten._softmax_backward_data.default",
    "torch.ops.aten._log_softmax_backward_data.default",
    "torch.ops.aten._local_scalar_dense.default",
    "torch.ops.aten._unsafe_view.default",
    "transformers.AutoModelForCausalLM._model_mapping",
    "transformers.LlamaForCausalLM._from_config",
    "transformers.LlamaForCausalLM._supports_sdpa",
    "transformers.Trainer._get_train_sampler",
    "transformers.Trainer._prepare_inputs",
    "trl.trainer.utils.add_fused_lm_head",
    "trl.trainer.utils._ChunkedLogProbFunction",
    "trl.trainer.utils._use_triton",
    "trl.cli.accelerate_config.resolve_accelerate_config_argument",
]


def resolve(path: str) -> object:
    """The object of a dotted path: the longest module in it, then attributes."""
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        for name in parts[n:]:
            found = getattr(found, name)
        return found
    raise ImportError(path)


@pytest.mark.parametrize("path", NAMES)
def test_the_name_is_there(path):
    try:
        resolve(path)
    except (ImportError, AttributeError):
        holds(path, False, path.partition(".")[0])


# torch: tensor subclasses


class Overriding(torch.Tensor):
    seen = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen += 1
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("no operator runs on a tensor without memory")


def test_tensor_subclasses():
    from fastft.compat.torch_private import subclass_of, without_memory, without_overrides

    data = torch.ones(3)
    x = subclass_of(Overriding, data)
    holds("Tensor._make_subclass", type(x) is Overriding and x.data_ptr() == data.data_ptr())
    Overriding.seen = 0
    with without_overrides():
        x.dim()
    holds("_C.DisableTorchFunctionSubclass", Overriding.seen == 0)
    x.dim()
    assert Overriding.seen == 1  # what is counted can be
    w = without_memory(Overriding, (2, 5), torch.bfloat16, torch.device("cpu"))
    with without_overrides():
        facts = type(w), w.shape, w.dtype, w.stride(), w.requires_grad, w.untyped_storage().nbytes() < 2
    want = (Overriding, (2, 5), torch.bfloat16, (0, 0), False)
    holds("Tensor._make_wrapper_subclass", facts[:5] == want)


def test_what_a_tensor_says_of_itself():
    from fastft.compat.torch_private import TENSOR_HOOKS

    x = torch.ones(3)
    before = x._version
    x.add_(1)
    holds("Tensor._version", x._version == before + 1)
    holds("Tensor._base", x[1:]._base is x)
    holds("Tensor._is_view", x[1:]._is_view() and not x._is_view())
    leaf = torch.ones(2, requires_grad=True)
    hooks, accumulate = TENSOR_HOOKS
    holds(f"Tensor.{hooks}", not getattr(leaf, hooks))
    leaf.register_hook(seen := lambda g: None)
    leaf.register_post_accumulate_grad_hook(seen)
    holds(f"Tensor.{hooks}", list(getattr(leaf, hooks).values()) == [seen])
    holds(f"Tensor.{accumulate}", list(getattr(leaf, accumulate).values()) == [seen])


# torch: the autograd engine


class Asking(torch.autograd.Function):
    """Sum of two; its backward notes what the engine says."""

    @staticmethod
    def forward(ctx, a, b, notes):
        ctx.notes = notes
        return a + b

    @staticmethod
    def backward(ctx, *grads):
        from fastft.compat import torch_private

        ctx.notes["task"] = torch_private.current_backward()
        ctx.notes["runs"] = [torch_private.will_run(node) for node, _ in ctx.next_functions[:2]]
        return grads[0], grads[0], None


def test_the_engine():
    from fastft.compat import torch_private

    x, y, notes = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True), {}
    out = Asking.apply(x * 2, y * 2, notes)
    holds("_C._current_graph_task_id", torch_private.current_backward() == -1)
    torch.autograd.grad(out, x)
    holds("_C._current_graph_task_id", notes["task"] >= 0)
    holds("_C._will_engine_execute_node", notes["runs"] == [True, False])
    holds("autograd node ._forward_cls", type(out.grad_fn)._forward_cls is Asking)


def test_hooks_on_saved_tensors():
    from fastft.compat.torch_private import hooks_on_saved_tensors

    symbol, pack = "_C._autograd._top_saved_tensors_default_hooks", lambda t: t
    holds(symbol, hooks_on_saved_tensors(True) is None)
    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        holds(symbol, hooks_on_saved_tensors(True) == (pack, pack))


def test_forward_mode_differentiation():
    from fastft.compat.torch_private import forward_ad

    holds("autograd.forward_ad._current_level", forward_ad._current_level < 0)
    with torch.autograd.forward_ad.dual_level():
        holds("autograd.forward_ad._current_level", forward_ad._current_level >= 0)


# torch: modes, operators, memory


def test_modes():
    from fastft.compat import torch_private as own
    from fastft_kernels.runtime.compat import dispatch_modes

    holds("_C._len_torch_function_stack", own.function_modes() == 0)
    with torch.overrides.BaseTorchFunctionMode():
        holds("_C._len_torch_function_stack", own.function_modes() == 1)
    symbol = "utils._python_dispatch._get_current_dispatch_mode_stack"
    holds(symbol, not own.is_under_fake_tensors())
    with own.FakeTensorMode() as mode:
        holds(symbol, own.is_under_fake_tensors())
        fake = torch.ones(3)
        with own.without_modes():
            holds("utils._python_dispatch._disable_current_modes", dispatch_modes() == 0)
            holds("utils._python_dispatch._disable_current_modes", type(torch.ones(1)) is torch.Tensor)
        with own.unset_fake_temporarily():
            holds("fake_tensor.unset_fake_temporarily", type(torch.ones(1)) is torch.Tensor)
        with pytest.raises(own.DataDependentOutputException) as e:
            fake.sum().item()
        holds("fake_tensor.DataDependentOutputException.func", "_local_scalar_dense" in str(e.value.func))
        with pytest.raises(own.DynamicOutputShapeException) as e:
            fake.nonzero()
        holds("fake_tensor.DynamicOutputShapeException.func", "nonzero" in str(e.value.func))
    holds("fake_tensor.FakeTensor", type(fake) is own.FakeTensor)
    holds("FakeTensorMode.from_tensor", type(mode.from_tensor(torch.ones(2))) is own.FakeTensor)
    assert "allow_non_fake_inputs" in inspect.signature(own.FakeTensorMode).parameters, (
        "torch: FakeTensorMode's argument"
    )


class Seeing(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.func = func
        return func(*args, **(kwargs or {}))


def test_operators_name_themselves():
    from fastft.compat.torch_private import operator_name, schema_name

    with Seeing() as mode:
        torch.ones(2).add(1)
    holds("OpOverload._opname", operator_name(mode.func) == "add")
    holds("OpOverload._schema", schema_name(mode.func) == "aten::add")
    with Seeing() as mode:
        torch.ones(2).softmax(0)
    holds("ops.aten._softmax", mode.func is torch.ops.aten._softmax.default)
    names = list(inspect.signature(torch.nn.functional.log_softmax).parameters)
    holds("nn.functional.log_softmax(_stacklevel)", names == ["input", "dim", "_stacklevel", "dtype"])


def test_fake_tensors_are_made_without_an_operator():
    from fastft.compat.torch_private import FakeTensor, FakeTensorMode, fake_device, fake_tensor, storage_id

    cpu, half = torch.device("cpu"), torch.bfloat16
    with FakeTensorMode() as mode, Seeing() as seen:
        seen.func = None
        whole = fake_tensor(mode, (4, 6), (6, 1), half, cpu)
        part = fake_tensor(mode, (6, 2), (1, 6), half, cpu, whole.untyped_storage(), 12)
        holds("in_kernel_invocation_manager", seen.func is None)
        holds("FakeTensor.fake_device", fake_device(part) == cpu)
        holds("FakeTensor", type(part) is FakeTensor and part.dtype == half and part.stride() == (1, 6))
        key = lambda t: storage_id(t.untyped_storage())
        holds("FakeTensor on another's storage", key(part) == key(whole) and part.storage_offset() == 12)
        holds("FakeTensor", (part.T @ whole.new_empty(6, 3)).shape == (2, 3))


def test_storages_are_told_apart():
    from fastft.compat.torch_private import FakeTensorMode, storage_id

    key = lambda t: storage_id(t.untyped_storage())
    for context in (torch.no_grad(), FakeTensorMode()):
        with context:
            x = torch.ones(4)
            y = x.clone()
            holds("UntypedStorage._cdata", key(x) == key(x[1:]) and key(x) != key(y))


def test_trees():
    from fastft.compat.torch_private import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

    tree = {"a": [1, (2.5, None)], "b": {"c": 3}}
    holds("utils._pytree.tree_leaves", tree_leaves(tree) == [1, 2.5, None, 3])
    changed = {"a": [2, (2.5, None)], "b": {"c": 4}}
    holds("utils._pytree.tree_map_only", tree_map_only(int, lambda n: n + 1, tree) == changed)
    leaves, spec = tree_flatten(tree)
    holds("utils._pytree.tree_unflatten", tree_unflatten(leaves, spec) == tree)


# torch: modules


def test_tables_of_hooks():
    from fastft.compat.torch_private import HOOK_TABLES, call_hooks

    module, hook = nn.Linear(2, 2), lambda *args, **kwargs: None
    of_state = {n for n in module.__dict__ if "state_dict" in n}
    there = {n for n in module.__dict__ if "hook" in n} - of_state - {"_is_full_backward_hook"}
    for name in there ^ set(HOOK_TABLES):
        holds(f"nn.Module.{name}", False)
    module.register_forward_hook(hook, with_kwargs=True, always_call=True)
    module.register_forward_pre_hook(hook, with_kwargs=True)
    module.register_full_backward_hook(hook)
    module.register_full_backward_pre_hook(hook)
    for name in HOOK_TABLES:
        holds(f"nn.Module.{name}", len(module.__dict__[name]) == 1)
    holds("nn.Module._forward_hooks", [list(t.values()) for t in call_hooks(module)] == [[hook]] * 4)


def test_what_stands_on_a_module():
    from fastft.compat.torch_private import COMPILED_CALL, COMPILED_MODULE, REPLICA, SHARDED, AnyDropout

    module = nn.Linear(2, 2)
    for name in ("_parameters", "_buffers", "_modules"):
        holds(f"nn.Module.{name}", isinstance(module.__dict__[name], dict))
    wrapped = torch.compile(module, backend="eager")
    holds(f"OptimizedModule.{COMPILED_MODULE}", wrapped._modules.get(COMPILED_MODULE) is module)
    module.compile(backend="eager")
    holds(f"nn.Module.{COMPILED_CALL}", callable(module.__dict__.get(COMPILED_CALL)))
    holds(f"nn.Module.{REPLICA}", REPLICA in nn.Linear(2, 2)._replicate_for_data_parallel().__dict__)
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)
    holds("nn.modules.dropout._DropoutNd", all(issubclass(k, AnyDropout) and k(0.5).p == 0.5 for k in kinds))
    flattened = importlib.import_module("torch.distributed.fsdp._common_utils").FSDP_FLATTENED
    holds(f"FSDP 1's {SHARDED[1]}", flattened == SHARDED[1])


def test_a_modules_casts_and_moves():
    from fastft.compat.torch_private import KeepsDtypes

    class Keeping(KeepsDtypes, nn.Linear):
        kept, heard = frozenset({"weight"}), None

        def _cast_to(self, dtype):
            self.heard = dtype

    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)):
        module = Keeping(2, 2)
        cast(module)
        holds("nn.Module._apply", module.weight.dtype == torch.float32 != module.bias.dtype == module.heard)
    holds("nn.Module._apply", Keeping(2, 2).to("meta").weight.is_meta)


def test_distributed_training():
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
    from torch.nn.parallel import distributed

    from fastft.compat.sharding_private import is_fsdp_pre_backward
    from fastft.compat.torch_private import is_ddp_sink

    model = nn.Module()
    model.__dict__["_ddp_sink_clone"] = True
    (out,) = distributed._DDPSink.apply(weakref.ref(model), torch.ones(1, requires_grad=True))
    holds("nn.parallel.distributed._DDPSink", is_ddp_sink(out.grad_fn) and not is_ddp_sink((out * 2).grad_fn))
    state = FSDPState()
    holds("FSDPState._pre_backward", is_fsdp_pre_backward(state._pre_backward))
    holds("FSDPState._pre_backward", not is_fsdp_pre_backward(state._register_pre_backward_hook))
    calls = inspect.getclosurevars(FSDPState._register_pre_backward_hook).unbound | set(
        FSDPState._register_pre_backward_hook.__code__.co_names
    )
    holds("FSDPState._pre_backward", {"register_hook", "_pre_backward"} <= calls)


def test_fsdp2(tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from fastft.compat.sharding_private import is_distributed, is_managed, only_gathers, sharded_parameters

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
        holds("FSDPModule", not is_managed([*model.modules()]) and not list(sharded_parameters([*model.modules()])))
        fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        holds("FSDPModule", is_managed([*model.modules()]) and all(map(is_distributed, model.parameters())))
        hooks = [h for table in (model._forward_hooks, model._forward_pre_hooks) for h in table.values()]
        holds("FSDPState._pre_forward, _post_forward", len(hooks) == 2 and all(map(only_gathers, hooks)))
        for where in (model, model[0]):  # before a forward only the wrapped module knows, then every one
            found = {(p.module, p.name): p for p in sharded_parameters([*where.modules()])}
            p = found[model[0], "weight"]
            holds("FSDPParam._orig_size", p.shape == (2, 4) and p.dtype == torch.bfloat16 and p.whole)
            holds("FSDPParamGroup.modules", p.modules == (model,) and len({id(p.unit) for p in found.values()}) == 1)
            model(torch.ones(1, 4)).sum().backward()
    finally:
        distributed.destroy_process_group()


def test_context_parallelism(tmp_path):
    from accelerate.big_modeling import _attach_context_parallel_hooks
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    from fastft.compat.accelerate_private import drops_mask
    from fastft.compat.sharding_private import context_parallel_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh, ids = init_device_mesh("cpu", (1,)), torch.zeros(1, 4)
        with context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1], no_restore_buffers={ids}):
            holds("_context_parallel._attention._replaced_functions", context_parallel_mesh() is mesh)
        holds("_context_parallel._attention._replaced_functions", context_parallel_mesh() is None)
    finally:
        distributed.destroy_process_group()
    model = nn.ModuleDict({"self_attn": nn.Linear(2, 2)})
    _attach_context_parallel_hooks(model)
    (hook,) = model["self_attn"]._forward_pre_hooks.values()
    holds("_attach_context_parallel_hooks", drops_mask(hook) and not drops_mask(print), "accelerate")


def test_ranks_that_are_not_there():
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from fastft.compat.sharding_private import forget_fsdp, has_shards, imagined_group, local_part

    model = nn.Linear(4, 6)
    before, cls = {**model.__dict__, "_parameters": dict(model._parameters)}, type(model)
    with imagined_group(3):
        holds("fake_pg", distributed.get_world_size() == 3 and distributed.get_rank() == 0)
        fully_shard(model, mesh=init_device_mesh("cpu", (3,)))
        holds("DTensor._local_tensor", local_part(model.weight).shape == (2, 4))
        holds("DTensor", has_shards([type(model.weight.data)]) and not has_shards([torch.Tensor]))
        model.__dict__, model.__class__ = before, cls
        forget_fsdp(model)
        fully_shard(model, mesh=init_device_mesh("cpu", (3,)))  # raises where it is remembered
    holds("fake_pg", not distributed.is_initialized())


@pytest.mark.zero
def test_deepspeed():
    zero = pytest.importorskip("deepspeed.runtime.zero.parameter_offload")
    utils = importlib.import_module("deepspeed.runtime.utils")
    from fastft.compat.sharding_private import is_engine_hook, is_zero3_leaf, only_gathers

    layer = nn.Linear(2, 2)
    zero.set_z3_leaf_module(layer, True)
    holds("_z3_leaf", is_zero3_leaf(layer) and not is_zero3_leaf(nn.Linear(2, 2)), "deepspeed")
    hook = utils.OutputBackwardHookManager(lambda: None)._make_backward_hook(None)
    holds("OutputBackwardHookManager", is_engine_hook(hook) and only_gathers(hook), "deepspeed")


# transformers


def llama(**settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=32,
            **settings,
        )
    ).train()


IDS = torch.arange(6)[None]


def test_checkpointed_layers():
    from fastft.compat.transformers_private import FUNCTION, SWITCH

    model = llama()
    layer = model.model.layers[0]
    holds(f"GradientCheckpointingLayer.{SWITCH}", getattr(layer, SWITCH) is False, "transformers")
    model.gradient_checkpointing_enable()
    holds(f"GradientCheckpointingLayer.{SWITCH}", layer.__dict__.get(SWITCH) is True, "transformers")
    called = []
    holds(f"GradientCheckpointingLayer.{FUNCTION}", FUNCTION in layer.__dict__, "transformers")
    layer.__dict__[FUNCTION] = lambda function, *args: called.append(args) or function(*args)
    model(IDS, use_cache=False)
    seen = len(called) == 1 and called[0][0].shape == (1, 6, 16)
    holds(f"GradientCheckpointingLayer.{FUNCTION}", seen, "transformers")


def test_implementations():
    from fastft.compat import transformers_private as own

    model = llama(attn_implementation="eager")
    holds(
        "PreTrainedConfig._attn_implementation", own.attention_implementation(model.config) == "eager", "transformers"
    )
    holds("PreTrainedModel._supports_sdpa", own.supports_sdpa(type(model)), "transformers")
    experts, config = mixture()
    holds("PreTrainedConfig._experts_implementation", own.experts_implementation(config) is not None, "transformers")
    own.set_experts_implementation(config, "eager")
    holds("PreTrainedConfig._experts_implementation", own.experts_implementation(config) == "eager", "transformers")
    holds("experts ._is_expert_parallel", own.is_expert_parallel(experts) is False, "transformers")
    gate = getattr(experts, own.GATE, None)
    holds(f"experts .{own.GATE}", gate is not None and gate(torch.ones(3, 24)).shape == (3, 12), "transformers")


def mixture():
    """(experts of a layer, their configuration)."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=32,
    )
    model = Qwen3MoeForCausalLM(config)
    return model.model.layers[0].mlp.experts, model.config


def test_collected_outputs():
    from fastft.compat.transformers_private import is_collecting_hook, is_collecting_outputs

    model, answers = llama(), []
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda *args: answers.append(is_collecting_outputs()))
    model(IDS, use_cache=False)
    model(IDS, use_cache=False, output_hidden_states=True)
    symbol = "utils.output_capturing._active_collector"
    holds(symbol, answers == [False, True], "transformers")
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    holds(symbol, sum(map(is_collecting_hook, hooks)) >= len(model.model.layers), "transformers")


def test_models_from_configurations(tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM

    from fastft.compat import transformers_private as own

    model = llama()
    known = own.knows(AutoModelForCausalLM, model.config) and not own.knows(AutoModelForSeq2SeqLM, model.config)
    holds("AutoModelForCausalLM._model_mapping", known, "transformers")
    with torch.device("meta"):
        made = own.from_config(LlamaForCausalLM, model.config, dtype=torch.bfloat16)
    right = made.dtype == torch.bfloat16 and made.device.type == "meta"
    holds("PreTrainedModel._from_config", right, "transformers")
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    # modules of which a second one is without the mark are told apart by it: it is not a setting of the module
    marked = any(own.LOADED in m.__dict__ for m in loaded.modules())
    holds(f"nn.Module.{own.LOADED}", marked, "transformers")


def test_the_trainers_methods():
    from transformers import Trainer

    calls = lambda f: set(inspect.unwrap(f).__code__.co_names)
    holds("Trainer._prepare_inputs", "_prepare_inputs" in calls(Trainer.training_step), "transformers")
    holds("Trainer._get_train_sampler", "_get_train_sampler" in calls(Trainer.get_train_dataloader), "transformers")


# PEFT


def test_adapters_of_a_layer():
    from peft import LoraConfig, get_peft_model

    from fastft.compat.peft_private import ACTIVE, DISABLED, enable_adapters

    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    layer = model.base_model.model[0]
    state = lambda: (layer.__dict__.get(DISABLED), list(layer.__dict__.get(ACTIVE, ())))
    named = state()[1] == ["default"] or layer.__dict__[ACTIVE] == "default"
    holds(f"BaseTunerLayer.{ACTIVE}", named, "peft")
    holds(f"BaseTunerLayer.{DISABLED}", state()[0] is False and not layer.disable_adapters, "peft")
    with model.disable_adapter():
        holds(f"BaseTunerLayer.{DISABLED}", state()[0] is True, "peft")
        enable_adapters(layer)
        holds(f"BaseTunerLayer.{DISABLED}", layer.disable_adapters is False, "peft")


def test_adapters_of_a_parameter():
    from peft import LoraConfig, get_peft_model

    from fastft.compat.peft_private import swaps_in_and_out

    experts, _ = mixture()
    config = LoraConfig(target_modules=[], target_parameters=["gate_up_proj"])
    wrapper = get_peft_model(nn.ModuleDict({"experts": experts}), config).base_model.model["experts"]
    a = wrapper.lora_A["default"].weight.shape[1]
    n, out, into = experts.gate_up_proj.shape
    assert out != into
    want = {into: True, out: False}[a] if n == 4 else None  # which way round PEFT took [experts, out, in]
    holds("ParamWrapper._did_swap_in_out_features", swaps_in_and_out(wrapper) is want, "peft")


# TRL


def test_the_fused_head():
    from fastft.compat import trl_private as own

    model = llama()
    own.add_fused_lm_head(model, outputs=own.OUTPUTS)
    forward = getattr(model.forward, "__func__", model.forward)
    for name in (own.LOG_PROBS, own.USE_TRITON):
        there = name in forward.__code__.co_names and name in forward.__globals__
        holds(f"trainer.utils.{name}, a global of the fused forward", there, "trl")
    holds(f"the fused forward's {own.FUSED}", own.FUSED in forward.__code__.co_varnames, "trl")
    function = forward.__globals__[own.LOG_PROBS]
    arguments = list(inspect.signature(function.forward).parameters)[1:]
    want = ["hidden", "weight", "bias", "targets", "temperature", "chunk_size"]
    want += ["final_logit_softcapping", "logit_scale", "outputs"]
    holds(f"{own.LOG_PROBS}'s arguments {arguments}", arguments == want, "trl")
    hidden, weight, target = torch.randn(3, 8), torch.randn(5, 8), torch.tensor([1, 2, 3])
    found = function.apply(hidden, weight, None, target, 1.0, 256, None, 1.0, own.OUTPUTS)
    logp = (hidden @ weight.T).log_softmax(-1)
    p, z = logp.exp(), hidden @ weight.T
    results = [
        logp[range(3), target],
        -(p * logp).sum(-1),
        p.square().sum(-1).log(),
        z.mean(-1),
        z.argmax(-1) == target,
    ]
    for name, got, expected in zip(("log_probs", *own.OUTPUTS), found, results):
        same = torch.equal(got, expected) if got.dtype == torch.bool else torch.allclose(got, expected, atol=1e-5)
        holds(f"{own.LOG_PROBS}'s result {name}", same, "trl")


def test_names_of_accelerate_configurations():
    from fastft.compat.trl_private import accelerate_arguments

    name, path = accelerate_arguments(["--accelerate_config", "fsdp2"])
    found = name == "--config_file" and Path(str(path)).is_file()
    holds("cli.accelerate_config.resolve_accelerate_config_argument", found, "trl")


# Accelerate


def test_what_accelerate_leaves():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    from fastft.compat import accelerate_private as own

    module = nn.Linear(2, 2)
    stock = module.forward
    holds(f"hooks: {own.HOOK}", not own.is_hooked(module) and own.execution_device(module) is None, "accelerate")
    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    holds(f"hooks: {own.HOOK}", own.is_hooked(module), "accelerate")
    holds(f"hooks: {own.HOOK}.execution_device", own.execution_device(module) == "cpu", "accelerate")
    holds(f"hooks: {own.OLD_FORWARD}", module.__dict__.get(own.OLD_FORWARD) == stock, "accelerate")
    left = set(module.__dict__) - set(nn.Linear(2, 2).__dict__) - {"forward"}
    holds(f"hooks: only {own.LEFT_BY_HOOKS} are left, not {left}", left == set(own.LEFT_BY_HOOKS), "accelerate")


def test_the_wrapper_of_mixed_precision():
    from accelerate import Accelerator
    from accelerate.utils.operations import ConvertOutputsToFp32

    from fastft.compat import accelerate_private as own

    forward = lambda x: x
    wrapper = ConvertOutputsToFp32(forward)
    holds(f"ConvertOutputsToFp32.{own.CALLED}", getattr(wrapper, own.CALLED, None) is forward, "accelerate")
    names = Accelerator.prepare_model.__code__.co_names
    holds(f"Accelerator.prepare_model: {own.ORIGINAL_FORWARD}", own.ORIGINAL_FORWARD in names, "accelerate")


# Nothing private stands elsewhere

# of nn.Module, Tensor, torch.ops and Python: the reasons stand in fastft/compat's docstring
IN_PLACE = {
    "_parameters": "nn.Module",
    "_buffers": "nn.Module",
    "_modules": "nn.Module",
    "_forward_hooks": "nn.Module",
    "_forward_pre_hooks": "nn.Module",
    "_backward_hooks": "nn.Module and Tensor",
    "_backward_pre_hooks": "nn.Module",
    "_forward_hooks_with_kwargs": "nn.Module",
    "_forward_hooks_always_called": "nn.Module",
    "_forward_pre_hooks_with_kwargs": "nn.Module",
    "_version": "Tensor",
    "_softmax": "torch.ops.aten",
    "_log_softmax": "torch.ops.aten",
    "_softmax_backward_data": "torch.ops.aten",
    "_log_softmax_backward_data": "torch.ops.aten",
    "_local_scalar_dense": "torch.ops.aten",
    "_unsafe_view": "torch.ops.aten",
    "_stacklevel": "an argument in the public signature of torch.nn.functional.softmax",
    "_current_level": "fastft.compat's forward_ad: a number that changes",
    "_is_exporting_flag": "fastft_kernels.runtime.compat's compiler: a flag that changes",
    "_reconstructor": "Python's copyreg: what pickles of protocol 1 name, so it cannot go",
    "_hooks": "a suffix of nn.Module's tables of hooks",
    "_hooks_with_kwargs": "a suffix of nn.Module's tables of hooks",
    "_hooks_always_called": "a suffix of nn.Module's tables of hooks",
}


ENDINGS = {  # of names of our kernels; of GGUF's types, and of settings
    "fastft": {"_token_id", "_k", "_k_s", "_k_m", "_k_l", "_K"},
    "fastft_kernels": {"_ptr", "_row", "_col", "_kernel"},
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith(("__", "_fastft")) and name[1:].isidentifier()


def private_names(files: dict[str, str]) -> dict[str, list[str]]:
    """By name, the places (file:line) where a private name that none of these files defines is read, written or
    imported."""
    trees = {name: ast.parse(text) for name, text in files.items()}
    own, found = set(), defaultdict(list)
    for node in (n for tree in trees.values() for n in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            flat = [x for t in targets for x in (t.elts if isinstance(t, ast.Tuple) else [t])]
            own.update(t.id for t in flat if isinstance(t, ast.Name))
            own.update(
                t.attr
                for t in flat
                if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id == "self"
            )
    for name, tree in trees.items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = [node.value]
            elif isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(a.name for a in node.names)]
            for n in names:
                if is_private(n) and n not in own and n not in IN_PLACE:
                    found[n].append(f"{name}:{node.lineno}")
    return dict(found)


@pytest.mark.parametrize(("package", "apart"), [("fastft", "compat/"), ("fastft_kernels", "runtime/compat.py")])
def test_private_names_stand_in_compat_alone(package, apart):
    found = {p.relative_to(ROOT / package).as_posix(): p.read_text() for p in ROOT.glob(f"{package}/**/*.py")}
    files = {name: text for name, text in found.items() if not name.startswith(apart)}
    assert len(found) > len(files) > 20
    assert private_names(files).keys() <= ENDINGS[package]


def test_a_private_name_is_seen():
    planted = "from torch._C import x\nfrom a import _b\nclass _own: pass\ny._own, y._theirs, getattr(y, '_quoted')"
    assert private_names({"f": planted}) == {
        "_C": ["f:1"],
        "_b": ["f:2"],
        "_theirs": ["f:4"],
        "_quoted": ["f:4"],
    }


def test_llama_cpp_ships_ggml():
    pytest.importorskip("llama_cpp")
    from fastft.compat.llama_cpp_private import ggml

    for name in ("ggml_get_name", "ggml_nbytes", "ggml_backend_tensor_get"):
        holds(f"ggml-base: {name}", hasattr(ggml(), name), library="llama_cpp")
