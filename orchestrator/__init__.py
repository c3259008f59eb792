"""The command, the driver and the workers: the only place that knows Ray, DeepSpeed and MLflow."""
