import math

import numpy as np
import pytest

from accounting.errors import InputError
from experiments.sweep import results

RECORDS = [
    {"Model": "ladder_20k", "Learning Rate": 2**-7, "Iterations": 4, "Noise Batch Ratio": 0.0, "Cross Entropy": 5.25,
                                                                     "Parameters": 20184,
     "Sequence Length": 16, "Held Out": 0.0, "Config": "a1"},
    {"Model": "ladder_45k", "Learning Rate": 1 / 3, "Iterations": 8, "Noise Batch"
                                                                     " Ratio": 2**-6, "Cross Entropy": math.nan,
     "Parameters": 45000, "Sequence Length": 16, "Held Out": 1.0, "Config": "b2", "Eval Loss": 4.5},
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_comes_back_as_it_was_written(suffix, tmp_path):
    table = results.of_records(RECORDS)
    path = tmp_path / f"results.{suffix}"
    results.write(path, table)
    first = path.read_bytes()
    again = results.read(path)
    assert list(again.columns) == [name for name in results.COLUMNS if name in table.columns]
    for name in table.columns:
        if name in (results.MODEL, results.CONFIG):
            assert again[name].tolist() == table[name].tolist()
        else:
            np.testing.assert_allclose(again[name], table[name], rtol=1e-9)
    results.write(path, again)
    assert path.read_bytes() == first and [p.name for p in tmp_path.iterdir()] == [path.name]
    assert again.held_out.tolist() == [False, True] and again.sequence_length == 16
    assert again.sizes == {"ladder_20k": 20184, "ladder_45k": 45000}
    assert again.rows(again.held_out)["Config"].tolist() == ["b2"]


def test_the_published_table_has_no_sizes_and_is_read_all_the_same(tmp_path):
    path = tmp_path / "published.csv"
    path.write_text(
        "Model,Learning Rate,Iterations,Noise Batch Ratio,Cross"
        " Entropy\nBertTiny,0.01,100,1e-07,6.5\nBertMega,0.01,100,0,\n"
    )
    table = results.read(path)
    assert table["Parameters"].tolist() == [4.5e6, 778e6] and table.sequence_length == 512 and not table.held_out.any()
    assert table["Noise Batch Ratio"][0] == 1e-7 and math.isnan(table["Cross Entropy"][1])


def test_missing_cells_are_no_numbers(tmp_path):
    path = tmp_path / "short.csv"
    path.write_text(
        "Model,Learning Rate,Iterations,Noise Batch Ratio,Cross Entropy,Parameters,Eval"
        " Loss\na,0.01,100,0,5,100\na,0.01,200,0,,100,4\n"
    )
    table = results.read(path)
    assert np.isnan(table["Eval Loss"]).tolist() == [True, False] and np.isnan(table["Cross Entropy"]).tolist() == [
        False,
        True,
    ]


def test_rows_of_different_lengths_have_no_common_law():
    with pytest.raises(InputError, match="fit each length by itself"):
        _ = results.of_records([RECORDS[0], {**RECORDS[1], "Sequence Length": 64}]).sequence_length


HEADER = "Model,Learning Rate,Iterations,Noise Batch Ratio,Cross Entropy"
BAD = {
    "empty.csv": (b"", "holds no results"),
    "header.csv": (HEADER.encode(), "holds no results"),
    "column.csv": (b"Model,Iterations\na,3\n", "has no column 'Learning Rate'"),
    "size.csv": (f"{HEADER}\nGPT,1,1,0,3\n".encode(), "how large GPT is"),
    "cell.csv": (f"{HEADER}\nBertTiny,1,one,0,3\n".encode(), "no number"),
    "short.csv": (f"{HEADER},Parameters\n\n,1\n".encode(), "no model"),
    "binary.csv": (b"\xff\xfe\x00", "is no CSV"),
    "text.parquet": (HEADER.encode(), "is no Parquet file"),
    "empty.parquet": (b"", "is no Parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_a_sentence(name, tmp_path):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        results.read(tmp_path / name)


def test_files_that_do_not_exist_or_are_of_another_kind_are_refused(tmp_path):
    for name in ("none.csv", "none.parquet"):
        with pytest.raises(InputError, match="does not exist"):
            results.read(tmp_path / name)
    with pytest.raises(InputError, match=r"a \.csv or a \.parquet"):
        results.write(tmp_path / "table.txt", results.of_records(RECORDS))
