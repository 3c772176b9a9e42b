"""Measures on quadratics which optax optimizers work inside the algorithms.

Every public optax factory belongs to one class, whose guarantee is tested here and
documented in docs/optimizers.md. A factory that a newer optax adds fails
`test_every_factory_is_classified` until it is measured and classified.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from optax import contrib

import decentral_jax as dj
from tests.support.registry import ALGORITHMS

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    # Deprecation warnings that one optax alias raises, and another raises internally.
    pytest.mark.filterwarnings("ignore:.*(optimistic_adam|seed).* is deprecated"),
]
RING = dj.topology.ring(8)
STEPS = 900
DRAWS = np.random.default_rng(0)
SHAPES = {"m": (3, 2), "v": (4,)}
CURVATURES = {k: np.linspace(0.5, 2, np.prod(s)).reshape(s) for k, s in SHAPES.items()}
# Two settings: one optimum per worker, and their mean as everyone's optimum.
TARGETS = {k: DRAWS.normal(size=(8, *s)) for k, s in SHAPES.items()}
TARGETS = {k: np.stack([t, t * 0 + t.mean(0)]) for k, t in TARGETS.items()}
NOISE = {k: 0.3 * DRAWS.normal(size=(8, STEPS, *s)) for k, s in SHAPES.items()}
RATE = 0.04


class Run(NamedTuple):
    """Results for heterogeneous and for equal optima."""

    bias: np.ndarray  # [2]: error of the mean model, averaged over the last steps
    spread: np.ndarray  # [2]: largest final distance between a model and the mean


class Case(NamedTuple):
    """An optimizer and the extra arguments of its `update`."""

    base: Callable[[], optax.GradientTransformation]
    extra: tuple[str, ...] = ()
    noise: float = 1.0
    wrap: Callable[[Any], Any] = lambda params: params


def run(tx, case, average=False):
    """Trains on one device, in both settings at once."""

    def worker(target, noise):
        params = case.wrap({k: jnp.full(s, 0.5) for k, s in SHAPES.items()})

        def body(carry, noise):
            params, state = carry
            model = getattr(params, "fast", params)

            def loss(x):
                terms = jax.tree.map(
                    lambda x, t, a, e: jnp.sum(a * (x - t) ** 2 / 2 + e * x),
                    *(x, target, curvatures, noise),
                )
                return sum(terms.values())

            value, grads = jax.value_and_grad(loss)(model)
            extra = {
                "value": dj.average(value) if average else value,
                "obj_fn": loss,
                "grad_fn": lambda x, step: jax.grad(loss)(x),
            }
            extra = {key: extra[key] for key in case.extra}
            updates, state = tx.update(grads, state, params, **extra)
            params = optax.apply_updates(params, updates)
            return (params, state), getattr(params, "fast", params)

        carry, path = lax.scan(body, (params, tx.init(params)), noise)
        late = jax.tree.map(lambda x: x[-STEPS // 3 :].mean(0), path)
        return late, getattr(carry[0], "fast", carry[0])

    curvatures, targets, noise = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), (CURVATURES, TARGETS, NOISE)
    )
    noise = jax.tree.map(lambda x: x * case.noise, noise)
    workers = jax.vmap(worker, axis_name="workers")
    # Compilation takes longer than the runs: disable optimization.
    unoptimized = {"xla_backend_optimization_level": 0}
    both = jax.jit(jax.vmap(workers, in_axes=(0, None)), compiler_options=unoptimized)
    late, last = both(targets, noise)
    bias = [late[k].mean(1) - TARGETS[k].mean(1) for k in SHAPES]
    spread = [last[k] - last[k].mean(1, keepdims=True) for k in SHAPES]
    return Run(*(_largest(x) for x in (bias, spread)))


def _largest(parts):
    return np.max([np.abs(x).reshape(2, -1).max(1) for x in parts], axis=0)


def d_psgd(base, order="combine_then_adapt"):
    """D-PSGD composed by hand, without the checks of `dj.d_psgd`."""
    return optax.chain(base, dj.gossip(RING, order=order))


def of(module, name, *args, **options):
    return Case(functools.partial(getattr(module, name), *args, **options))


def scaled(base, rate=RATE):
    """A case for a transformation that does not apply a learning rate itself."""
    return Case(lambda: optax.chain(base(), optax.scale_by_learning_rate(rate)))


def even(step, **extra_args):
    return step % 2 == 0


def always(step, **extra_args):
    return step >= 0


sgd = functools.partial(optax.sgd, RATE)


def cases(names, *args, module=optax):
    return {name: of(module, name, *args) for name in names.split()}


# Linear in the gradient, with weights that are equal on all workers: the mean model
# follows the model of all-reduce.
AS_IS = {
    "add_decayed_weights": scaled(lambda: optax.add_decayed_weights(1e-3)),
    "add_noise": scaled(lambda: optax.add_noise(0.1, 0.5, 0)),
    "apply_every": Case(lambda: optax.chain(sgd(), optax.apply_every(2))),
    "ema": scaled(lambda: optax.ema(0.9)),
    "identity": scaled(optax.identity),
    "lbfgs": Case(lambda: optax.lbfgs(RATE, linesearch=None), noise=0.0),
    "noisy_sgd": of(optax, "noisy_sgd", RATE, key=0),
    "optimistic_gradient_descent": of(optax, "optimistic_gradient_descent", RATE),
    "scale": Case(lambda: optax.scale(-RATE)),
    "scale_by_learning_rate": of(optax, "scale_by_learning_rate", RATE),
    "scale_by_schedule": Case(lambda: optax.scale_by_schedule(lambda step: -RATE)),
    "schedule_free": Case(lambda: contrib.schedule_free(sgd(), RATE)),
    "schedule_free_sgd": of(contrib, "schedule_free_sgd", 2 * RATE),
    "sgd": Case(sgd),
    "snapshot": scaled(lambda: optax.snapshot("norm", optax.tree.norm)),
    "split_real_and_imaginary": Case(
        lambda: contrib.split_real_and_imaginary(optax.sgd(RATE))
    ),
    "stateless": scaled(lambda: optax.stateless(lambda updates, params: updates)),
    "stateless_with_tree_map": scaled(
        lambda: optax.stateless_with_tree_map(lambda update, param: update)
    ),
    "trace": scaled(lambda: optax.trace(0.9), RATE / 10),
    "zero_nans": scaled(optax.zero_nans),
}


def _per_example(base):
    def add_axis(updates, params):
        return jax.tree.map(lambda x: x[None], updates)

    return lambda: optax.chain(optax.stateless(add_axis), base())


# Each worker rescales its own gradient: the mean model follows the model of all-reduce
# only if the workers' data are similar or if gradients are tracked.
RESCALES = {
    **cases("adabelief adam adamax adamaxw adamw adan amsgrad lion nadam nadamw", RATE),
    **cases("optimistic_adam_v2 radam rmsprop sign_sgd signum yogi fromage lamb", RATE),
    **cases("novograd adafactor", RATE),
    **cases("adagrad sm3", 0.3),
    **cases("acprop ademamix adopt muon", RATE, module=contrib),
    **cases("dog dowg", 1.0, module=contrib),
    "adadelta": of(optax, "adadelta", 2.0),
    "adaptive_grad_clip": scaled(lambda: optax.adaptive_grad_clip(1.0)),
    "clip": scaled(lambda: optax.clip(1.0)),
    "clip_by_block_rms": scaled(lambda: optax.clip_by_block_rms(1.0)),
    "clip_by_global_norm": scaled(lambda: optax.clip_by_global_norm(1.0)),
    "differentially_private_aggregate": scaled(
        _per_example(
            lambda: contrib.differentially_private_aggregate(
                l2_norm_clip=1.0, noise_multiplier=0.01, key=0
            )
        )
    ),
    "dpsgd": Case(
        _per_example(
            lambda: contrib.dpsgd(RATE, l2_norm_clip=1.0, noise_multiplier=0.01, seed=0)
        )
    ),
    "galore": of(contrib, "galore", RATE),
    "lars": of(optax, "lars", 5.0),
    "normalize": scaled(contrib.normalize),
    "normalize_by_update_norm": scaled(optax.normalize_by_update_norm),
    "optimistic_adam": of(optax, "optimistic_adam", RATE),
    "scale_by_distance_over_gradients": scaled(
        lambda: optax.scale_by_distance_over_gradients(1.0), 1.0
    ),
    "scale_by_factored_rms": scaled(optax.scale_by_factored_rms),
    "scale_by_param_block_norm": scaled(optax.scale_by_param_block_norm),
    "scale_by_param_block_rms": scaled(optax.scale_by_param_block_rms),
    "scale_by_stddev": scaled(optax.scale_by_stddev),
    "scale_by_trust_ratio": scaled(optax.scale_by_trust_ratio),
    "schedule_free_adamw": of(contrib, "schedule_free_adamw", 2 * RATE),
    "simplified_ademamix": of(contrib, "simplified_ademamix", RATE / 100),
    "sophia": of(contrib, "sophia", RATE)._replace(extra=("obj_fn",)),
}
# Optimizers that read the loss, which must be the mean over workers.
READS_VALUE = {
    "momo": of(contrib, "momo", RATE),
    "momo_adam": of(contrib, "momo_adam", RATE),
    "polyak_sgd": of(optax, "polyak_sgd", RATE)._replace(noise=0.0),
    "reduce_on_plateau": Case(
        lambda: optax.chain(sgd(), contrib.reduce_on_plateau(0.7, 20))
    ),
}
READS_VALUE = {k: c._replace(extra=("value",)) for k, c in READS_VALUE.items()}
# Optimizers that need averaged gradients and must be the only ones to move parameters.
MOVES_ALONE = {
    "cocob": of(contrib, "cocob"),
    "dadapt_adamw": of(contrib, "dadapt_adamw"),
    "madgrad": of(contrib, "madgrad", RATE),
    "mechanize": Case(lambda: contrib.mechanize(sgd())),
    "prodigy": of(contrib, "prodigy"),
    "rprop": of(optax, "rprop", RATE)._replace(noise=0.0),
    "sam": Case(
        lambda: contrib.sam(
            sgd(), optax.chain(contrib.normalize(), optax.sgd(0.05)), sync_period=3
        )
    ),
}
LINE_SEARCHES = {
    "scale_by_backtracking_linesearch": of(
        optax, "scale_by_backtracking_linesearch", 10
    ),
    "scale_by_zoom_linesearch": of(optax, "scale_by_zoom_linesearch", 10),
}
# Wrappers, which belong to the class of the optimizer that they wrap.
WRAPPERS = {
    "apply_if_finite": lambda base: optax.apply_if_finite(base, 3),
    "chain": lambda base: optax.chain(base),
    "conditionally_mask": lambda base: optax.conditionally_mask(base, even),
    "conditionally_transform": lambda base: optax.conditionally_transform(base, always),
    "flatten": optax.flatten,
    "inject_hyperparams": lambda base: optax.inject_hyperparams(
        lambda scale: optax.chain(base, optax.scale(scale))
    )(1.0),
    "inject_stateful_hyperparams": lambda base: optax.inject_hyperparams(
        lambda scale: optax.chain(base, optax.scale(scale))
    )(1.0),
    "lookahead": lambda base: optax.lookahead(base, 5, 0.5),
    "masked": lambda base: optax.masked(base, {"m": True, "v": True}),
    "multi_transform": lambda base: optax.multi_transform({0: base}, {"m": 0, "v": 0}),
    "MultiSteps": lambda base: optax.MultiSteps(base, 2).gradient_transformation(),
    "named_chain": lambda base: optax.named_chain(("base", base)),
    "partition": lambda base: optax.partition({0: base}, {"m": 0, "v": 0}),
    "selective_transform": lambda base: optax.selective_transform(
        base, freeze_mask={"m": False, "v": False}
    ),
    "with_extra_args_support": optax.with_extra_args_support,
}
# Parts of the optimizers above: part -> optimizer.
PARTS = {
    "hutchinson_estimator_diag_hessian": "sophia",
    "scale_by_acprop": "acprop",
    "scale_by_adadelta": "adadelta",
    "scale_by_adam": "adam",
    "scale_by_adamax": "adamax",
    "scale_by_adan": "adan",
    "scale_by_ademamix": "ademamix",
    "scale_by_adopt": "adopt",
    "scale_by_amsgrad": "amsgrad",
    "scale_by_belief": "adabelief",
    "scale_by_cocob": "cocob",
    "scale_by_galore": "galore",
    "scale_by_lbfgs": "lbfgs",
    "scale_by_lion": "lion",
    "scale_by_madgrad": "madgrad",
    "scale_by_muon": "muon",
    "scale_by_novograd": "novograd",
    "scale_by_optimistic_gradient": "optimistic_gradient_descent",
    "scale_by_polyak": "polyak_sgd",
    "scale_by_radam": "radam",
    "scale_by_rms": "rmsprop",
    "scale_by_rprop": "rprop",
    "scale_by_rss": "adagrad",
    "scale_by_sign": "sign_sgd",
    "scale_by_simplified_ademamix": "simplified_ademamix",
    "scale_by_sm3": "sm3",
    "scale_by_yogi": "yogi",
}
# Transformations that move away from the optimum, or do not move at all.
PROJECTS = {"centralize", "freeze", "keep_params_nonnegative", "set_to_zero"}
NO_OPTIMIZERS = {
    "matrix_inverse_pth_root",
    "measure_with_ema",
    "monitor",
    "schedule_free_eval_params",
    "sigmoid_binary_cross_entropy",
    "update_infinity_moment",
    "update_moment",
    "update_moment_per_elem_norm",
}


def factories():
    """Yields the public optax functions that may return an optimizer."""
    for module in (optax, contrib):
        for name, fn in vars(module).items():
            is_function = isinstance(fn, (types.FunctionType, functools.partial))
            if is_function and not name.startswith("_"):
                returned = inspect.signature(fn).return_annotation
                unknown = returned is inspect.Signature.empty
                if unknown or "GradientTransformation" in str(returned):
                    yield name


def test_every_factory_is_classified():
    """If a new optax factory fails here, measure it and update docs/optimizers.md."""
    classes = (AS_IS, RESCALES, READS_VALUE, MOVES_ALONE, LINE_SEARCHES, WRAPPERS)
    classified = [*PARTS, *PROJECTS, *NO_OPTIMIZERS, *(k for c in classes for k in c)]
    assert len(set(classified)) == len(classified)
    found = set(factories())
    assert not found - set(classified)
    assert not set(classified) - found - {"MultiSteps"}  # a class


@pytest.mark.parametrize("name", AS_IS)
def test_mean_model_follows_all_reduce(name):
    result = run(d_psgd(AS_IS[name].base()), AS_IS[name])
    assert result.bias.max() < 0.06
    assert result.spread.max() < 0.6


@pytest.mark.parametrize("name", RESCALES)
def test_rescaled_on_each_worker(name):
    case = RESCALES[name]
    gossiped = run(d_psgd(case.base()), case)
    assert gossiped.bias[1] < 0.1
    assert gossiped.spread.max() < 1
    # Adaptive steps do not shrink at the optimum, so the trackers' noise matters.
    assert run(dj.dsgt(case.base(), RING), case).bias.max() < 0.1


@pytest.mark.parametrize("name", READS_VALUE)
def test_reads_value(name):
    """Converges with the mean loss; all-reduce refuses a loss that is not the mean."""
    case = READS_VALUE[name]
    tx = dj.all_reduce_sgd(case.base())
    result = run(tx, case, average=True)
    assert result.bias.max() < 0.1
    assert result.spread.max() < 1e-6
    assert run(dj.dsgt(case.base(), RING), case, average=True).bias[1] < 0.1

    def step(x, average):
        value = dj.average(jnp.sum(x)) if average else jnp.sum(x)
        return tx.update(x, tx.init(x), x, value=value)[0]

    workers, x = dj.Workers(8), jnp.ones((8, 3))
    jax.eval_shape(workers.spmd(functools.partial(step, average=True)), x)
    with pytest.raises(
        ValueError, match=r"value must be equal .*value=dj\.average\(loss\)"
    ):
        jax.eval_shape(workers.spmd(functools.partial(step, average=False)), x)


def test_unread_value_is_allowed():
    tx = dj.all_reduce_sgd(0.1)

    def step(x):
        return tx.update(x, tx.init(x), x, value=jnp.sum(x))[0]

    jax.eval_shape(dj.Workers(8).spmd(step), jnp.ones((8, 3)))


# One setting of every algorithm that takes an optimizer.
SETTINGS = {
    setting.build.__name__: setting
    for setting in ALGORITHMS.values()
    if "optimizer" in inspect.signature(setting.build).parameters
}
ALONE, TOGETHER = (
    {
        name: functools.partial(setting.build, **setting.arguments)
        for name, setting in SETTINGS.items()
        if setting.alone == alone
    }
    for alone in (True, False)
)
PARAMS = {"m": jnp.ones((3, 2)), "v": jnp.ones(4)}


def test_every_algorithm_with_an_optimizer_is_covered():
    algorithms = {name: getattr(dj.algorithms, name) for name in dj.algorithms.__all__}
    taking = {
        name
        for name, function in algorithms.items()
        if "optimizer" in inspect.signature(function).parameters
    }
    assert taking == SETTINGS.keys()


@pytest.mark.parametrize("name", MOVES_ALONE)
def test_moves_alone(name):
    """Converges with averaged gradients, but not when composed by hand with gossip."""
    case = MOVES_ALONE[name]
    for make in ALONE.values():
        make(case.base()).init(PARAMS)
    for make in TOGETHER.values():
        with pytest.raises(ValueError, match=rf"{name}.*all_reduce_sgd"):
            make(case.base()).init(PARAMS)
    alone = run(dj.all_reduce_sgd(case.base()), case)
    assert alone.bias.max() < 0.1
    assert alone.spread.max() < 1e-6
    orders = ("combine_then_adapt", "adapt_then_combine")
    gossiped = [run(d_psgd(case.base(), order), case) for order in orders]
    assert not max(np.nan_to_num(r.spread, nan=np.inf).max() for r in gossiped) < 1


@pytest.mark.parametrize("name", LINE_SEARCHES)
@pytest.mark.parametrize("algorithm", ALONE | TOGETHER)
def test_line_searches_are_refused(name, algorithm):
    base = optax.chain(sgd(), LINE_SEARCHES[name].base())
    with pytest.raises(ValueError, match=rf"{name}.*linesearch=None"):
        (ALONE | TOGETHER)[algorithm](base).init(PARAMS)


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_belong_to_the_class_of_their_content(name):
    wrapped = WRAPPERS[name]
    with pytest.raises(ValueError, match="optimizer must not contain prodigy"):
        dj.d_psgd(wrapped(contrib.prodigy()), RING).init(PARAMS)
    wrap = optax.LookaheadParams.init_synced if name == "lookahead" else lambda x: x
    result = run(d_psgd(wrapped(optax.sgd(2 * RATE))), Case(sgd, wrap=wrap))
    assert result.bias.max() < 0.06
    assert result.spread.max() < 1


@pytest.mark.parametrize("name", PARTS)
def test_parts_have_the_state_of_their_optimizer(name):
    whole = (AS_IS | RESCALES | READS_VALUE | MOVES_ALONE)[PARTS[name]].base()
    make = getattr(optax, name, None) or getattr(contrib, name)
    required = [
        parameter
        for parameter in inspect.signature(make).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    state = make(*[1.0 for _ in required]).init(PARAMS)
    kind = type(state)
    nodes = jax.tree.leaves(whole.init(PARAMS), is_leaf=lambda x: type(x) is kind)
    assert any(type(node) is kind for node in nodes)
