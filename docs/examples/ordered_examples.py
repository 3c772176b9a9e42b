"""D-GraB orders the examples, and Grain loads them in that order.

Eight workers share the training set of handwritten digits. While they train, D-GraB
balances the gradients of single examples, and keeps the next epoch's order in the
optimizer state. Between two epochs, the host reads the order, and hands it to Grain.
"""

import grain
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn import datasets

import decentral_jax as dj

# BATCH is even, as D-GraB balances pairs, and divides PER_WORKER, so that each batch
# lies within one epoch.
NUM_WORKERS, PER_WORKER, BATCH, EPOCHS = 8, 180, 4, 20
RATE, DECAY = 2.0, 1e-3


class Classifier(nnx.Module):
    """Multinomial logistic regression."""

    def __init__(self, rngs: nnx.Rngs):
        self.logits = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        """Maps an image `[64]` to logits `[10]`."""
        return self.logits(x)


def load_digits():
    """Returns the training records of each worker, and the test digits, `[8, ...]`."""
    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    order = order[: len(order) // NUM_WORKERS * NUM_WORKERS].reshape(NUM_WORKERS, -1)
    train, test = np.split(order, [PER_WORKER], axis=1)
    records = [[(images[i], labels[i]) for i in of_worker] for of_worker in train]
    return records, transform((images[test], labels[test]))


def transform(record):
    """Prepares a record for training.

    It draws nothing at random: D-GraB expects an example to have about the same
    gradient in the next epoch.
    """
    image, label = record
    return image.astype(np.float32) / 16, label.astype(np.int32)


def batches(records, order, workers):
    """Returns the batches of one epoch, `[workers, BATCH, ...]`, which Grain loads.

    Args:
      records: The records of each worker.
      order: The order of each worker's records, `[8, PER_WORKER]`.
      workers: Numbers of the workers to load records for.
    """
    shards = [
        grain.MapDataset.source(order[worker])
        .map(records[worker].__getitem__)
        .map(transform)
        .batch(BATCH)
        for worker in workers
    ]
    # `mix` takes one batch from each worker in turn, and the last `batch` stacks them.
    # Two threads load the next batches during a training step.
    return (
        grain.MapDataset.mix(shards)
        .batch(len(shards))
        .to_iter_dataset(grain.ReadOptions(num_threads=2))
    )


def loss_fn(model, image, label):
    """Returns the cross-entropy of one example."""
    return optax.softmax_cross_entropy_with_integer_labels(model(image), label)


def create(workers):
    """Returns the state of all workers."""
    # D-GraB takes the gradients of single examples, and passes on their mean.
    tx = optax.chain(
        dj.d_grab(PER_WORKER, NUM_WORKERS),
        optax.add_decayed_weights(DECAY),
        optax.sgd(RATE),
    )
    model = Classifier(nnx.Rngs(0))
    return workers.replicate((model, nnx.Optimizer(model, tx, wrt=nnx.Param)))


def train_step(state, images, labels):
    """Trains one worker on one batch."""
    model, optimizer = state
    # Losses and gradients of single examples: a leading axis of size BATCH.
    of_each = nnx.vmap(nnx.value_and_grad(loss_fn), in_axes=(None, 0, 0))
    losses, grads = of_each(model, images, labels)
    optimizer.update(model, grads)
    return (model, optimizer), dj.average(losses.mean())


def next_order(state):
    """Returns the order of this worker's next epoch."""
    return dj.next_examples(state[1].opt_state, PER_WORKER)


def test_accuracy(state, images, labels):
    """Evaluates the common model, each worker on its part of the test set."""
    model, optimizer = state
    params = nnx.state(model, nnx.Param)
    nnx.update(model, dj.eval_params(optimizer.opt_state, params))
    return dj.average(jnp.mean(model(images).argmax(-1) == labels))


def main() -> float:
    """Trains, prints and returns the test accuracy."""
    records, test = load_digits()
    workers = dj.Workers(NUM_WORKERS)
    state = create(workers)
    step = workers.spmd(train_step, donate_argnums=0)
    read_order = workers.spmd(next_order)
    for epoch in range(1, EPOCHS + 1):
        order = workers.gather(read_order(state))
        losses = []
        # Each process loads the records of its own workers.
        epoch_batches = batches(records, order, workers.local)
        for batch in dj.data.prefetch(epoch_batches, workers):
            state, loss = step(state, *batch)
            losses.append(workers.gather(loss)[0])
        if epoch % 5 == 0:
            print(f"epoch {epoch}: loss {np.mean(losses):.4f}")
    evaluate = workers.spmd(test_accuracy)
    accuracy = workers.gather(evaluate(state, *workers.shard(test)))[0]
    print(f"test accuracy {accuracy:.3f}")
    return float(accuracy)


if __name__ == "__main__":
    main()
