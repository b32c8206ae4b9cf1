#!/usr/bin/env bash
# mlflow 3.17.2: `mlflow.artifacts.download_artifacts("runs:/ID/NAME", tracking_uri=STORE)` finds a file of the run in STORE, but not
# a logged model of the same run: the model is looked up in the process's own store (here an empty one), and the error says that the
# path is wrong. Expected: the store that the call names is asked for both. With `mlflow.set_tracking_uri(STORE)` both are found.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mlflow==3.17.2
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException

store = f"sqlite:///{Path('named.db').resolve()}"
mlflow.set_tracking_uri(f"sqlite:///{Path('own.db').resolve()}")
client = mlflow.MlflowClient(store)
experiment = client.create_experiment("e", artifact_location=str(Path("files").resolve()))
run = client.create_run(experiment).info.run_id
Path("weights.txt").write_text("1")
client.log_artifact(run, "weights.txt", "plain")
Path("model").mkdir()
Path("model/MLmodel").write_text("flavors: {}\n")
model = client.create_logged_model(experiment, "net", run).model_id
client.log_model_artifacts(model, "model")
client.finalize_logged_model(model, "READY")


def found(path: str, **where: str) -> bool:
    try:
        mlflow.artifacts.download_artifacts(f"runs:/{run}/{path}", **where)
    except MlflowException as error:
        print(f"  {error}")
        return False
    return True


print("mlflow", mlflow.__version__)
seen = {path: found(path, tracking_uri=store) for path in ("plain", "net")}
print("named in the call:", seen)
mlflow.set_tracking_uri(store)
own = {path: found(path) for path in ("plain", "net")}
print("store of the process:", own)
assert own == {"plain": True, "net": True}
assert seen == {"plain": True, "net": False}, "the named store is asked for models now"
PYTHON
