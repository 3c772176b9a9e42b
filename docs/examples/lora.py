"""LoRA on a slow network: only low-rank adapters are trained, and only they travel.

A classifier that knows the digits 0 to 4 learns the digits 5 to 9 on eight workers. Its
weights are frozen and shared: each device holds one copy. The state of a worker is its
adapters, which it averages with those of one other worker in each step.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn import datasets

import decentral_jax as dj

NUM_WORKERS, BATCH, EPOCHS, RATE, RANK = 8, 8, 20, 0.01, 4
PRETRAINING_STEPS, PRETRAINING_BATCH, PRETRAINING_RATE = 300, 32, 1e-3

# Fine-tuning takes gradients with respect to these leaves of the model only.
ADAPTERS = nnx.DiffState(0, nnx.LoRAParam)


class MLP(nnx.Module):
    """Two hidden layers of 256 units."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden1 = nnx.Linear(64, 256, rngs=rngs)
        self.hidden2 = nnx.Linear(256, 256, rngs=rngs)
        self.logits = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x):
        """Maps images `[batch, 64]` to logits `[batch, 10]`."""
        return self.logits(nnx.relu(self.hidden2(nnx.relu(self.hidden1(x)))))


def add_adapters(model: MLP, rngs: nnx.Rngs):
    """Adds a product of two thin matrices, which is 0 at first, to each dense layer."""
    for name in ("hidden1", "hidden2", "logits"):
        layer = getattr(model, name)
        sizes = layer.in_features, RANK, layer.out_features
        setattr(model, name, nnx.LoRA(*sizes, base_module=layer, rngs=rngs))


def load_digits(classes):
    """Returns the images and labels of some digits, in random order."""
    images, labels = datasets.load_digits(return_X_y=True)
    chosen = np.flatnonzero(np.isin(labels, classes))
    chosen = np.random.default_rng(0).permutation(chosen)
    return images[chosen].astype(np.float32) / 16, labels[chosen].astype(np.int32)


def split_digits():
    """Returns training and test digits 5 to 9, `[8, per_worker, ...]`."""
    images, labels = load_digits(range(5, 10))
    numbers = np.arange(len(images) // NUM_WORKERS * NUM_WORKERS)
    train, test = np.split(numbers.reshape(NUM_WORKERS, -1), [88], axis=1)
    return (images[train], labels[train]), (images[test], labels[test])


def batches(rng, images, labels):
    """Yields the batches of one epoch, `[8, BATCH, ...]`, in a new random order."""
    order = rng.permutation(images.shape[1])
    for chosen in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
        yield images[:, chosen], labels[:, chosen]


def loss_fn(model, images, labels):
    """Returns the mean cross-entropy."""
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def pretrain() -> MLP:
    """Trains all weights on the digits 0 to 4, in one place."""
    images, labels = load_digits(range(5))
    model = MLP(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(PRETRAINING_RATE), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, images, labels):
        optimizer.update(model, nnx.grad(loss_fn)(model, images, labels))

    rng = np.random.default_rng(0)
    for _ in range(PRETRAINING_STEPS):
        chosen = rng.integers(len(images), size=PRETRAINING_BATCH)
        step(model, optimizer, images[chosen], labels[chosen])
    return model


def create(workers):
    """Returns the workers' state, the base that they share, and the algorithm."""
    # One message to one worker per step.
    topology = dj.topology.one_peer_exponential(NUM_WORKERS)
    tx = dj.d_psgd(optax.adam(RATE), topology)
    model = pretrain()
    add_adapters(model, nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    graphdef, adapters, frozen = nnx.split(model, nnx.LoRAParam, ...)
    state = workers.replicate((adapters, optimizer))
    # One copy per device, without a worker axis.
    base = jax.device_put((graphdef, frozen), workers.replicated)
    # To keep frozen and trained leaves in one tree instead, put the algorithm inside a
    # partition. A partition inside the algorithm would send the frozen leaves, too.
    #   tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)
    return state, base, tx


def train_step(state, images, labels, base):
    """Trains the adapters of one worker on one batch."""
    adapters, optimizer = state
    model = nnx.merge(*base, adapters)
    loss, grads = nnx.value_and_grad(loss_fn, argnums=ADAPTERS)(model, images, labels)
    optimizer.update(model, grads)
    return (nnx.state(model, nnx.LoRAParam), optimizer), dj.average(loss)


def test_accuracy(state, images, labels, base):
    """Evaluates the averaged adapters, each worker on its part of the test set."""
    adapters, optimizer = state
    model = nnx.merge(*base, dj.eval_params(optimizer.opt_state, adapters))
    return dj.average(jnp.mean(model(images).argmax(-1) == labels))


def main() -> float:
    """Trains, prints and returns the test accuracy."""
    (images, labels), test = split_digits()
    workers = dj.Workers(NUM_WORKERS)
    state, base, tx = create(workers)
    step = workers.spmd(train_step, donate_argnums=0, shared_argnames="base")
    evaluate = workers.spmd(test_accuracy, shared_argnames="base")
    test = workers.shard(test)

    # Full fine-tuning would send the leaves of the base.
    adapters = jax.tree.map(lambda x: x[0], state[0])
    for name, params in (("adapters", adapters), ("full fine-tuning", base[1])):
        costs = dj.communication_costs(tx, params, axis_sizes=workers.sizes)
        print(f"{name}: {costs.bytes_per_step:,.0f} bytes sent per worker per step")

    accuracy = workers.gather(evaluate(state, *test, base=base))[0]
    print(f"test accuracy before fine-tuning {accuracy:.3f}")
    rng = np.random.default_rng(0)
    for epoch in range(1, EPOCHS + 1):
        losses = []
        for batch in batches(rng, images, labels):
            state, loss = step(state, *workers.shard(batch), base=base)
            losses.append(workers.gather(loss)[0])
        if epoch % 5 == 0:
            print(f"epoch {epoch}: loss {np.mean(losses):.3f}")
    accuracy = workers.gather(evaluate(state, *test, base=base))[0]
    print(f"test accuracy {accuracy:.3f}")
    return float(accuracy)


if __name__ == "__main__":
    main()
