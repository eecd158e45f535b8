"""How well a recommender rates and ranks: by jax, so that an `eval_fn` can compute it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import mpjax


def rmse(prediction_N: jax.Array, rating_N: jax.Array) -> jax.Array:
    """The root of the mean squared error, in float32. It is that of all ratings only if all are given at once."""
    return jnp.sqrt(mpjax.losses.squared_error(prediction_N, rating_N).mean())


def ndcg(
    prediction_N: jax.Array, rating_N: jax.Array, user_N: jax.Array, users: int, first: int = 10
) -> tuple[jax.Array, jax.Array]:
    """Normalised discounted cumulative gain of each user's ratings: (its sum over users, how many users), in float32.

        DCG = Σ (2^rating − 1) / log₂(1 + place) over the first ten places;  NDCG = DCG / DCG of the best order

    Films with the same prediction share their places: each has the mean gain of all of them, which is the mean over the
    orders in which they could stand (half precision makes such ties). A user with one rating has but one order, and does
    not count.

    Args:
      prediction_N, rating_N: floats; what is greater is put first.
      user_N: int, from 0 to `users` - 1. All ratings of a user are given at once.
      users: how many.
      first: how many places count.

    Source: Järvelin and Kekäläinen, Cumulated gain-based evaluation of IR techniques (2002); Burges et al., Learning to
    rank using gradient descent (2005), whose gain it is; McSherry and Najork, Computing IR performance measures efficiently
    in the presence of tied scores (2008).
    """
    gain_N = jnp.exp2(rating_N.astype(jnp.float32)) - 1

    def dcg(score_N: jax.Array) -> jax.Array:
        order = jnp.lexsort((-score_N, user_N))
        user, score = user_N[order], score_N[order]
        new = jnp.concatenate([jnp.array([True]), (user[1:] != user[:-1]) | (score[1:] != score[:-1])])
        tie = jnp.cumsum(new) - 1
        shared = _sums(gain_N[order], tie, len(tie)) / jnp.maximum(_sums(jnp.ones_like(gain_N), tie, len(tie)), 1)
        place = jnp.arange(len(user)) - jnp.searchsorted(user, user)  # 0 for the first of each user
        discount = jnp.where(place < first, 1 / jnp.log2(place + 2.0), 0)
        return _sums(shared[tie] * discount, user, users)

    counts = _sums(jnp.ones_like(gain_N), user_N, users) > 1
    found, best = dcg(prediction_N.astype(jnp.float32)), dcg(gain_N)
    return jnp.where(counts, found / jnp.maximum(best, 1e-6), 0).sum(), counts.sum()


def _sums(x_N: jax.Array, group_N: jax.Array, groups: int) -> jax.Array:
    return jax.ops.segment_sum(x_N, group_N, groups)
