"""Differentially private gradients of a loss of your own, without a run's folder, tokenizer or Gemma.

A linear regression on synthetic records: batches are drawn by the mechanism's sampler, each record's gradient is
clipped, noise of the mechanism is added, and epsilon follows from the very same mechanism.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpgemma
from dpgemma.data.batch import collate
from dpgemma.data.source import InMemory

STEPS = 200


def loss(weights: jax.Array, unit: dpgemma.Unit) -> jax.Array:
    """The squared error of one record."""
    x, y = unit.rows["x"][0], unit.rows["y"][0]
    return 0.5 * (x @ weights - y) ** 2


def main() -> tuple[float, float]:
    """Trains, and returns (distance of the weights from those that made the data, epsilon)."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=8).astype(np.float32)
    x = rng.normal(size=(20_000, 8)).astype(np.float32)
    source = InMemory({"x": x, "y": x @ truth})

    mechanism = dpgemma.dp_sgd(
        source.num_units,
        500,
        600,
        noise_multiplier=1.0,
        clip_norm=1.0,
        steps=STEPS,
        neighbouring_relation="zero_out",
        grid_bits=20,  # sums and noise in whole numbers of 2^-20 of the noise: nothing is lost to rounding
    )
    sampler, noiser = dpgemma.sampler_of(mechanism.sampling), dpgemma.noiser_of(mechanism)
    # In earnest: 32 bytes each from secrets.token_bytes, kept to yourself.
    sampling_key, noise_key = b"known to everyone, for a demo...", b"another one, known just as well."
    weights, optimizer = jnp.zeros(8), optax.sgd(0.5)
    state, noise_state = optimizer.init(weights), noiser.init(weights)

    @jax.jit
    def step(weights, state, noise_state, batch, keys):
        steps, how = noiser.steps(noiser.multiplier), dpgemma.Strategy("vmap", 600)
        clipped = dpgemma.clipped_sum(loss, weights, batch, mechanism.clip, how, steps=steps)
        noised, noise_state = noiser.add(clipped, noise_state, keys, noiser.multiplier)
        mean = dpgemma.divide(noised, mechanism.expected_batch_size)
        updates, state = optimizer.update(mean.mean, state)
        return optax.apply_updates(weights, updates), state, noise_state

    for t in range(STEPS):
        batch = collate(source, sampler.draw(sampling_key, t), 600)
        weights, state, noise_state = step(weights, state, noise_state, batch, dpgemma.noise_keys(noise_key, t))
    return float(jnp.linalg.norm(weights - truth)), dpgemma.Accountant(mechanism).upper(1e-6)


if __name__ == "__main__":
    distance, epsilon = main()
    print(f"weights are {distance:.3f} from the truth, at epsilon {epsilon:.2f} and delta 1e-06")
