"""The environment variables with which Ray is configured, here and in its workers."""

from __future__ import annotations

import os

from orchestration.config import LaunchConfig


def ray_environment(launch: LaunchConfig) -> dict[str, str]:
    """Return the variables that Ray must find, in this process and in its workers."""
    # A token belongs to a cluster; for a private Ray this mode makes ``ray.init`` fail.
    if launch.address:
        reach = {"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token")}
    else:
        reach = {
            # As on a Mac, Ray then takes the node's address to be 127.0.0.1, and its servers listen
            # on loopback alone.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # Every user of the machine could read the metrics, without a token; nothing collects
            # those of a private Ray.
            "RAY_enable_metrics_collection": "0",
            "AUTOSCALER_METRIC_PORT": "-1",
            "DASHBOARD_METRIC_PORT": "-1",
        }
    return {
        **reach,
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(launch.poll_s),
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1" if launch.address else "0",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20" if launch.worker.min_workers else "60",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        # With ``graceful_shutdown``'s handler the trials save first.
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        # Otherwise a trial that fails before its first epoch, without metrics, ends the experiment.
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore"),
    }
