"""Which keys a query may look at, as an argument of attention."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """A query at position t sees the keys at positions t - before < s <= t + after.

    Causal attention has after = 0; a sliding layer sees `before` positions, its own included; an encoder has both
    numbers at least as large as its rows.

    Attributes:
      before: int32, may be traced, so that layers of several kinds share one program.
      after: how far a query sees ahead; a constant, because tiles beyond it are skipped.
    """

    before: jax.Array
    after: int = dataclasses.field(default=0, metadata={"static": True})

    def visible(self, t: jax.Array, s: jax.Array, length: int) -> jax.Array:
        """Bool, broadcast from the positions of queries and keys.

        Args:
          length: number of keys; positions from there on are padding of tiles.
        """
        within = (s <= t + self.after) & (s > t - self.before)
        # Without a look ahead, padding lies behind every query.
        return within & (s < length) if self.after else within

    def key_tiles(self, query_tile: jax.Array, block: int, count: int) -> tuple[jax.Array, jax.Array]:
        """The tiles of keys (first, end) that a tile of queries may see, of `count` tiles of `block` positions."""
        first = jnp.maximum(query_tile * block - self.before + 1, 0) // block
        return first, jnp.minimum(query_tile + 1 + -(-self.after // block), count)

    def query_tiles(self, key_tile: jax.Array, block: int, count: int) -> tuple[jax.Array, jax.Array]:
        """The tiles of queries (first, end) that may see a tile of keys."""
        first = jnp.maximum(key_tile - -(-self.after // block), 0)
        return first, jnp.minimum(((key_tile + 1) * block + self.before - 2) // block + 1, count)


def causal(length: int, window: int, is_sliding: jax.Array | bool) -> Window:
    """Causal attention, over all of a row or, in a sliding layer, over the last `window` positions."""
    return Window(jnp.where(is_sliding, window, length).astype(jnp.int32))
