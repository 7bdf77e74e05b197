"""Keep: which checkpoints of a run stay."""

import dataclasses
import math

from orbax.checkpoint import checkpoint_managers


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay when a new one is written; one that any of these asks for does."""

    latest: int
    every: int = 0  # those of multiples of so many steps
    best: int = 0  # so many
    metric: str = ""  # by it
    mode: str = "min"

    def policy(self) -> checkpoint_managers.PreservationPolicy:
        policies: list[checkpoint_managers.PreservationPolicy] = [checkpoint_managers.LatestN(self.latest)]
        if self.every:
            policies.append(checkpoint_managers.EveryNSteps(self.every))
        if self.best:
            lowest = self.mode == "min"  # the last ones in order are kept
            best = checkpoint_managers.BestN(
                get_metric_fn=self.value, reverse=lowest, n=self.best, keep_checkpoints_without_metrics=False
            )
            policies.append(best)
        return checkpoint_managers.AnyPreservationPolicy(policies)

    def value(self, metrics: dict[str, float]) -> float:
        """The metric; that of a checkpoint which has another one, of an earlier config, is worse than all others."""
        return metrics.get(self.metric, math.inf if self.mode == "min" else -math.inf)
