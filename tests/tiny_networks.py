"""Exact answers about tiny networks of rectifiers, by independent means."""

from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn


def plain_intervals(network, low, high):
    """Float64 interval arithmetic of a Sequential, written on its own: one neuron at a time."""
    for layer in network:
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach().double().numpy()
            bias = layer.bias.detach().double().numpy()
            new_low, new_high = bias.copy(), bias.copy()
            for row in range(len(weight)):
                for column, value in enumerate(weight[row]):
                    ends = (value * low[column], value * high[column])
                    new_low[row] += min(ends)
                    new_high[row] += max(ends)
            low, high = new_low, new_high
        elif isinstance(layer, nn.ReLU):
            low, high = np.maximum(low, 0), np.maximum(high, 0)
        else:
            raise TypeError(layer)
    return low, high


def tiny(seed, sizes=(4, 6, 5, 3)):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


def exact_minimum(network, low, high, row):
    """The smallest row @ scores over a box, by mixed-integer programming (Tjeng et al. 2019)."""
    lower, upper = [low], [high]
    constraints = []
    variables = len(low)
    last = slice(0, variables)
    binary = []
    linears = [layer for layer in network if isinstance(layer, nn.Linear)]
    pieces = []  # (weights over all variables so far, bias) of the scores
    current = low, high
    for number, layer in enumerate(linears):
        weight = layer.weight.detach().double().numpy()
        bias = layer.bias.detach().double().numpy()
        if number == len(linears) - 1:
            pieces = [(row @ weight, last, float(row @ bias))]
            break
        below, above = plain_intervals([layer], *current)
        n = len(bias)
        out = slice(variables, variables + n)
        flags = slice(variables + n, variables + 2 * n)
        variables += 2 * n
        lower += [np.zeros(n), np.zeros(n)]
        upper += [np.maximum(above, 0), np.ones(n)]
        binary.append(flags)
        constraints.append((weight, bias, last, out, flags, below, above))
        current = np.maximum(below, 0), np.maximum(above, 0)
        last = out
    objective = np.zeros(variables)
    coefficients, place, constant = pieces[0]
    objective[place] = coefficients
    tables = []
    for weight, bias, source, out, flags, below, above in constraints:
        n = len(bias)
        table = np.zeros((n, variables))
        table[:, source] = -weight
        table[:, out] = np.eye(n)
        tables.append(LinearConstraint(table.copy(), bias, np.inf))  # out >= pre
        table[:, flags] = -np.diag(np.minimum(below, 0))  # out <= pre - below (1 - flag)
        tables.append(LinearConstraint(table, -np.inf, bias - np.minimum(below, 0)))
        table = np.zeros((n, variables))
        table[:, out] = np.eye(n)
        table[:, flags] = -np.diag(np.maximum(above, 0))  # out <= above * flag
        tables.append(LinearConstraint(table, -np.inf, 0))
    integrality = np.zeros(variables)
    for flags in binary:
        integrality[flags] = 1
    ends = Bounds(np.concatenate(lower), np.concatenate(upper))
    found = milp(objective, integrality=integrality, bounds=ends, constraints=tables)
    assert found.success
    return found.fun + constant
