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
      begins: int32 [..., T], no later than t; where rows hold several texts that must not see each other, the position
        at which that of every query begins. None where a row is one text.
    """

    before: jax.Array
    after: int = dataclasses.field(default=0, metadata={"static": True})
    begins: jax.Array | None = None

    def visible(self, t: jax.Array, s: jax.Array, length: int) -> jax.Array:
        """Bool, broadcast from the positions of queries and keys; with `begins` [..., 1, 1, T, S].

        Args:
          t, s: positions [T, 1] and [S].
          length: number of keys; positions from there on are padding of tiles.
        """
        within = (s <= t + self.after) & (s > t - self.before)
        if self.begins is not None:
            begin = jnp.take(self.begins, t[:, 0], axis=-1, mode="clip")
            within = within & (s >= begin[..., None, None, :, None])
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


def causal(length: int, window: int, is_sliding: jax.Array | bool, begins: jax.Array | None = None) -> Window:
    """Causal attention, over all of a row (or of the text that `begins` there) or, in a sliding layer, over the last
    `window` positions.
    """
    return Window(jnp.where(is_sliding, window, length).astype(jnp.int32), begins=begins)
