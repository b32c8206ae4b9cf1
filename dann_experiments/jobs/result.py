"""The result that a job returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RunResult:
    """A finished run, as returned by `pretrain`, `adapt` and `evaluate`."""

    job: str
    run_id: str
    experiment_id: str
    tracking_uri: str = field(repr=False)
    """The store's address, including a password in it; not shown in repr."""
    metrics: Mapping[str, float]
    """Final metrics: of the validation sets of both domains, and of the test sets, if there are any."""
    baseline: Mapping[str, float] = field(default_factory=dict)
    """The same metrics before the first step."""
    source_run_id: str | None = None
    """The run that made the model which this run started from or evaluated."""
    artifacts: str | None = None
    """Folder of the run's files; None if it is not on this machine."""
    views: Mapping[str, str] = field(default_factory=dict)
    """Saved views of the experiment in MLflow: title -> page, as a fragment of an address that starts with `#`."""

    @property
    def model_uri(self) -> str:
        """Address of the run's model, for `source_checkpoint`, `evaluate` and other jobs."""
        return f"runs:/{self.run_id}/model"

    def history(self) -> pd.DataFrame:
        """Return every logged value, read from MLflow: columns metric, step, value. Infinity and NaN are as they were logged."""
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
