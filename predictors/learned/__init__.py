"""Predictors that are trained: one file a family, imported when it is asked for, because they import torch."""
