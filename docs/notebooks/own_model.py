# %% [markdown]
# # Train a model of your own privately
#
# Any loss of one record that JAX can differentiate will do. Here: a small Flax network that tells two spirals apart.

# %%
import jax
import numpy as np
import optax
from flax import nnx

import dpgemma

rng = np.random.default_rng(0)
turn, side = rng.uniform(0.5, 3, 8000), rng.integers(0, 2, 8000)
x = np.stack([turn * np.cos(2 * turn + np.pi * side), turn * np.sin(2 * turn + np.pi * side)], axis=1)
records = {"x": (x + rng.normal(0, 0.1, x.shape)).astype(np.float32), "label": side.astype(np.int32)}

# %%
network = nnx.Sequential(nnx.Linear(2, 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 64, rngs=nnx.Rngs(1)), nnx.relu,
                         nnx.Linear(64, 2, rngs=nnx.Rngs(2)))  # fmt: skip
form, start = nnx.split(network)


def loss(parameters, record):
    """Of ONE record: it must not look at any other."""
    logits = nnx.merge(form, parameters)(record["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, record["label"])


# %%
fitted = dpgemma.fit(
    loss, start, records, epsilon=3.0, delta=1e-5, batch_size=800, steps=150, optimizer=optax.adam(0.02)
)

# %%
right = jax.vmap(lambda point: nnx.merge(form, fitted.parameters)(point).argmax())(records["x"]) == records["label"]
print(f"epsilon {fitted.epsilon} at delta {fitted.delta}: {float(right.mean()):.0%} of the points on the right side")
print(f"noise multiplier {fitted.mechanism.noise_multiplier:.4f}, batches of at most {fitted.mechanism.max_batch_size}")
