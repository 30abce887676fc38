import numpy as np
import pytest

from lightning_edge.functional.contexts import (
    DIRECTIONS,
    ENERGY_WEIGHTS,
    Contexts,
    Neighbourhood,
    direction_class,
    geometries,
    mean_level,
    weigh,
)


def logarithm(value):
    """16 x log2 of a whole number, a straight line between powers of two."""
    exponent = value.bit_length() - 1
    return 16 * exponent + int(16 * (value / 2**exponent - 1))


def slow_view(levels, geometry, column, *, mean):
    """Energies and directions of a column, element by element."""
    rows, (_, _, width) = len(levels), geometry
    size = geometry[1] * width
    plane, place = divmod(column, size)
    y, x = divmod(place, width)
    offsets = [(0, 1), (0, 2), *((dy, dx) for dy in (1, 2) for dx in (-2, -1, 0, 1, 2))]
    inside = [(y - dy, x - dx) for dy, dx in offsets if y - dy >= 0 and 0 <= x - dx < width]

    def at(row, y, x):
        return int(levels[row][plane * size + y * width + x]) if y >= 0 and x >= 0 else 0

    near = [sum(abs(at(row, *place)) for place in inside) for row in range(rows)]
    row_energy = [
        logarithm(max(1, (64 * sum(abs(int(v)) for v in levels[row][:column]) + 8 * mean) // (column + 8)))
        for row in range(rows)
    ]
    kernel = [logarithm(max(1, (64 * total + 2 * mean) // (len(inside) + 2))) for total in near]
    everywhere = logarithm(max(1, (64 * sum(near) + rows * mean) // (rows * (len(inside) + 1))))
    sides = [(at(r, y, x - 1), at(r, y - 1, x), at(r, y - 1, x - 1)) for r in range(rows)]
    directions = [2 * left + 2 * above - corner for left, above, corner in sides]
    touching = [(left != 0) + (above != 0) for left, above, _ in sides]
    return row_energy, kernel, everywhere, directions, touching


@pytest.mark.parametrize("geometry", [(3, 3, 3), (2, 1, 5), (12, 1, 1), (1, 4, 4), (1, 5, 2)])
def test_a_neighbourhood_is_what_a_slow_look_at_every_element_finds(geometry):
    generator = np.random.default_rng(0)
    columns = int(np.prod(geometry))
    levels = generator.integers(-4, 5, (6, columns)) * (generator.random((6, columns)) < 0.6)
    mean = mean_level(levels)
    seen = Neighbourhood(6, geometry, mean=mean)
    for column in range(columns):
        row, kernel, everywhere, directions, touching = slow_view(levels, geometry, column, mean=mean)
        found = seen.energies()
        assert found[0].tolist() == row
        assert found[1].tolist() == kernel
        assert found[2] == everywhere
        assert seen.directions().tolist() == directions
        assert seen.touching().tolist() == touching
        seen.put(levels[:, column])


@pytest.mark.parametrize("count", list(DIRECTIONS))
def test_classes_of_direction_are_symmetric_and_in_order(count):
    values = np.arange(-400, 401)
    classes = direction_class(values, count, mean=100)
    assert sorted(set(classes.tolist())) == list(range(count))
    assert (np.diff(classes) >= 0).all()
    assert classes[values == 0] == count // 2


@pytest.mark.parametrize("directions", [0, 1, 5])
def test_contexts_number_every_pair_of_an_energy_and_a_class(directions):
    contexts = Contexts(weighting=0, base=10, step=5, energies=4, directions=directions)
    classes = directions or 3
    weighted, kinds = np.meshgrid([0, 10, 14, 15, 20, 25, 900], np.arange(classes), indexing="ij")
    found = contexts.combine(weighted, kinds)
    assert found[:, 0].tolist() == [energy * classes for energy in (0, 0, 0, 1, 2, 3, 3)]
    assert sorted(set(found.ravel().tolist())) == list(range(contexts.count))


def test_energies_are_weighed_by_the_chosen_weights():
    energies = (np.array([1, 2]), np.array([10, 20]), 100)
    for index, (row, kernel, column) in enumerate(ENERGY_WEIGHTS):
        assert weigh(energies, index).tolist() == [
            row + 10 * kernel + 100 * column,
            2 * row + 20 * kernel + 100 * column,
        ]


def test_the_mean_level_is_never_zero():
    assert mean_level(np.zeros(5, dtype=np.int64)) == 1


def test_columns_of_a_matrix_may_come_from_square_planes():
    assert geometries((300, 784)) == [(784, 1, 1), (196, 2, 2), (49, 4, 4), (16, 7, 7), (4, 14, 14), (1, 28, 28)]
    assert geometries((8, 4, 7)) == [(4, 1, 7)]
    assert geometries((8, 4, 3, 5)) == [(4, 3, 5)]
    assert geometries((8, 2, 3, 3, 3)) == [(6, 3, 3)]
