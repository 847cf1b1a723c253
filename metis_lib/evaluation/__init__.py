"""Evaluation: judges, metrics with protocol ids, statistics, the steps of a task and the papermill runner."""
