"""What a job gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    job: str
    run_id: str
    experiment_id: str
    tracking_uri: str = field(repr=False)
    """The store's address, a password in it included; not shown in repr."""
    metrics: Mapping[str, float]
    """Final values: validation of both domains, and the test lists where there are any."""
    baseline: Mapping[str, float] = field(default_factory=dict)
    """The same before the first step: the warm start's."""
    source_run_id: str | None = None
    """The pretraining run it started from."""
    artifacts: str | None = None
    """Folder of the run's files, if it is on this machine."""

    @property
    def model_uri(self) -> str:
        """Where the run's model is, for `source_checkpoint`, `evaluate` and others."""
        return f"runs:/{self.run_id}/model"

    def history(self) -> pd.DataFrame:
        """Every logged value, read back from MLflow: columns metric, step, value. Infinity and NaN are as they were logged."""
        import mlflow
        import pandas as pd

        from dann_experiments.tracking.values import logged_points

        client = mlflow.MlflowClient(tracking_uri=self.tracking_uri)
        rows = [
            {"metric": name, "step": point.step, "value": point.value}
            for name in sorted(client.get_run(self.run_id).data.metrics)
            for point in logged_points(client, self.run_id, name)
        ]
        return pd.DataFrame(rows, columns=["metric", "step", "value"]).sort_values(
            ["metric", "step"], ignore_index=True, kind="stable"
        )
