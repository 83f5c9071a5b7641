"""Weight averaging: stochastic weight averaging and fast geometric ensembles.

`swa` and `snapshots` wrap any optimizer and keep its iterates w_k, those of the
steps k = start, start + every, ...: one their mean, the other copies. They go
with `cyclical_schedule` and `triangular_schedule`, whose cycles they share, and
`swa_params` and `snapshot_params` read them out of any optimizer state.
Averaged weights need BatchNorm statistics of their own: `estimate_batch_stats`
for Flax linen, `sam_optax.averaging.nnx.update_batch_stats` for NNX.
`ensemble_predictions` averages predictions. For exponential averages of
gradients or parameters there is `optax.ema`.
"""

from sam_optax.averaging._batch_norm import estimate_batch_stats as estimate_batch_stats
from sam_optax.averaging._ensemble import SnapshotsState as SnapshotsState
from sam_optax.averaging._ensemble import ensemble_predictions as ensemble_predictions
from sam_optax.averaging._ensemble import snapshot_params as snapshot_params
from sam_optax.averaging._ensemble import snapshots as snapshots
from sam_optax.averaging._schedules import cyclical_schedule as cyclical_schedule
from sam_optax.averaging._schedules import triangular_schedule as triangular_schedule
from sam_optax.averaging._swa import SWAState as SWAState
from sam_optax.averaging._swa import swa as swa
from sam_optax.averaging._swa import swa_params as swa_params

__all__ = (
    "SWAState",
    "SnapshotsState",
    "cyclical_schedule",
    "ensemble_predictions",
    "estimate_batch_stats",
    "snapshot_params",
    "snapshots",
    "swa",
    "swa_params",
    "triangular_schedule",
)
