"""A character-level language model: a Flax nnx transformer and DiLoCo.

Eight workers share Python's documentation as training text. They take AdamW steps
alone, and exchange what they have learned every ten steps.
"""

from pydoc_data.topics import topics

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import decentral_jax as dj

NUM_WORKERS, CONTEXT, BATCH = 8, 32, 4
STEPS, ACCUMULATE, PERIOD = 300, 2, 10  # micro-batches per step, steps per exchange
RATE, EMA_DECAY = 1e-2, 0.5
OUTER_RATE, OUTER_MOMENTUM = 0.7, 0.5  # long runs use more momentum, as published 0.9
WIDTH, HEADS, LAYERS = 64, 4, 2
# Activations and gradients of activations are bfloat16, parameters float32.
DTYPES = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}


class Block(nnx.Module):
    """Causal attention and a feed-forward network, each on normalized inputs."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, **DTYPES, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, use_bias=False, decode=False, **DTYPES, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(WIDTH, **DTYPES, rngs=rngs)
        self.wide = nnx.Linear(WIDTH, 4 * WIDTH, **DTYPES, rngs=rngs)
        self.narrow = nnx.Linear(4 * WIDTH, WIDTH, **DTYPES, rngs=rngs)

    def __call__(self, x, mask):
        """Maps activations `[batch, length, width]` to the same shape."""
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.narrow(nnx.gelu(self.wide(self.norm2(x))))


class Transformer(nnx.Module):
    """A decoder-only transformer."""

    def __init__(self, vocabulary: int, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(vocabulary, WIDTH, **DTYPES, rngs=rngs)
        self.positions = nnx.Embed(CONTEXT, WIDTH, **DTYPES, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, **DTYPES, rngs=rngs)
        self.logits = nnx.Linear(WIDTH, vocabulary, **DTYPES, rngs=rngs)

    def __call__(self, tokens):
        """Maps characters `[batch, length]` to logits `[batch, length, vocabulary]`."""
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.logits(self.norm(x)).astype(jnp.float32)


def load_text():
    """Returns the training text `[8, n]`, test windows `[8, m, 33]`, and characters."""
    text = "".join(topics.values())
    characters = sorted(set(text))
    tokens = np.searchsorted(characters, list(text)).astype(np.int32)
    train, test = np.split(tokens, [len(tokens) // 10 * 9])
    # Every worker holds its own part of the text, and of the windows to test on.
    train = train[: len(train) // NUM_WORKERS * NUM_WORKERS].reshape(NUM_WORKERS, -1)
    per_worker = len(test) // (NUM_WORKERS * (CONTEXT + 1))
    test = test[: NUM_WORKERS * per_worker * (CONTEXT + 1)]
    return train, test.reshape(NUM_WORKERS, per_worker, CONTEXT + 1), characters


def batches(text, seed=0):
    """Yields random windows `[8, batch, 33]` of the workers' texts, without end."""
    rng = np.random.default_rng(seed)
    worker = np.arange(NUM_WORKERS)[:, None, None]
    while True:
        start = rng.integers(text.shape[1] - CONTEXT, size=(NUM_WORKERS, BATCH, 1))
        yield text[worker, start + np.arange(CONTEXT + 1)]


def loss_fn(model, windows):
    """Returns the mean cross-entropy of the next character, in nats."""
    logits, targets = model(windows[:, :-1]), windows[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def train_step(state, windows):
    """Trains one worker on one micro-batch: an ordinary nnx step."""
    model, optimizer = state
    loss, grads = nnx.value_and_grad(loss_fn)(model, windows)
    optimizer.update(model, grads)
    return (model, optimizer), loss


def update_ema(ema, state):
    """Moves the average of past models toward the workers' common model."""
    model, optimizer = state
    params = dj.eval_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    return optax.incremental_update(params, ema, 1 - EMA_DECAY)


def local_optimizer():
    """Returns the optimizer of each worker; its schedule counts steps."""
    rate = optax.warmup_cosine_decay_schedule(0.0, RATE, STEPS // 10, STEPS, RATE / 10)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1)
    )


def create(workers, vocabulary):
    """Returns the initial model and optimizer of every worker, and the average."""
    # DiLoCo averages what the workers have learned, and takes an outer step with it.
    outer = optax.sgd(OUTER_RATE, momentum=OUTER_MOMENTUM, nesterov=True)
    diloco = dj.diloco(local_optimizer(), period=PERIOD, outer=outer)
    tx = dj.accumulate(diloco, ACCUMULATE)
    model = Transformer(vocabulary, nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    return workers.replicate(((model, optimizer), params))


def test_loss(state, ema, windows):
    """Returns the loss of the averaged past models, and of the common model.

    Each worker evaluates its part of the test text.
    """
    model, optimizer = state
    params = dj.eval_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    nnx.update(model, params)
    last = dj.average(loss_fn(model, windows))
    nnx.update(model, ema)
    return dj.average(loss_fn(model, windows)), last


def main() -> float:
    """Trains, prints and returns the test loss in nats per character."""
    text, test_windows, characters = load_text()
    workers = dj.Workers(NUM_WORKERS)  # on the available devices
    state, ema = create(workers, len(characters))
    micro_step = workers.spmd(train_step, donate_argnums=0)
    average = workers.spmd(update_ema, donate_argnums=0)
    stream = batches(text)
    for step in range(1, STEPS + 1):
        for _ in range(ACCUMULATE):
            state, loss = micro_step(state, workers.shard(next(stream)))
        if step % PERIOD == 0:
            ema = average(ema, state)
        if step % (STEPS // 5) == 0:
            print(f"step {step}: loss {workers.gather(loss).mean():.3f}", flush=True)
    losses = workers.spmd(test_loss)(state, ema, workers.shard(test_windows))
    averaged, last = (values[0] for values in workers.gather(losses))
    print(f"test loss {averaged:.3f}; without averaging {last:.3f}")
    return float(averaged)


if __name__ == "__main__":
    main()
