"""report.py: rows.csv there and back, means and deviations, what counts as the best, the plots' series."""

import builtins
import dataclasses
import multiprocessing

import pytest

from evaluation import report
from evaluation.report import FIGURES, Line, Spread


def line(method="a", family="box", seed=0, kind="inpainting", decoding=None, **figures) -> Line:
    settings = {"kind": kind} | ({"decoding": decoding} if decoding else {})
    return Line(method, family, seed, 8, f"{method}{family}{seed}", {"fd_vgg16": 1.0} | figures, settings)


def test_lines_come_back_as_they_were(tmp_path):
    lines = [
        line(kid=-1 / 3, **{"psnr 10-20": 20.25, "n 10-20": 3}),
        line("b, the \"other\"", seed=None, raw_fd_vgg16=1e-9, decoding={"top_k": 3}),
    ]  # fmt: skip
    report.write_lines(tmp_path / "new" / "rows.csv", lines)
    assert report.read_lines(tmp_path / "new" / "rows.csv") == lines
    assert report.read_lines(tmp_path / "none.csv") == []
    header = (tmp_path / "new" / "rows.csv").read_text().splitlines()[0]
    assert header == "method,family,seed,n,key,fd_vgg16,kid,raw_fd_vgg16,n 10-20,psnr 10-20,settings"


def add(path, name, count):
    for seed in range(count):
        report.add_line(path, line(name, seed=seed))


def test_two_processes_lose_none_of_each_others_lines(tmp_path):
    path = tmp_path / "rows.csv"
    both = [multiprocessing.get_context("fork").Process(target=add, args=(path, name, 30)) for name in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert {(each.method, each.seed) for each in report.read_lines(path)} == {(x, s) for x in "ab" for s in range(30)}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["row,family\na,b\n", "method,family,seed,n,key,settings\na,b,x,3,k,{}\n", "\n\nx\n"])
def test_another_file_is_named(tmp_path, text):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(ValueError, match=r"rows\.csv, row 2: not a line of a sweep"):
        report.read_lines(tmp_path / "rows.csv")


def test_chosen_lines_are_in_the_order_asked_for():
    lines = [line("a"), line("b"), line("a", seed=1)]
    assert report.chosen(lines, [("b", "bbox0"), ("a", "abox1"), ("c", "cbox0")]) == [lines[1], lines[2]]


def test_the_latest_lines_of_a_method_are_of_one_n_and_of_one_kind_of_settings():
    first, second = line(seed=0), line(seed=1)
    finer, other, fewer = (line(seed=seed, decoding={"top_k": 3}) for seed in (0, 2, 0))
    fewer = dataclasses.replace(fewer, n=4)
    lines = [line("b"), first, second, fewer]
    assert report.latest(lines, ["a", "b"]) == [fewer] and report.latest(lines, ["b", "a"], 8) == lines[:3]
    assert report.latest([first, second, finer, other], ["a"]) == [finer, other]
    assert report.latest([finer, other, first], ["a"]) == [first] and report.latest([], ["a"]) == []


def test_spread_is_the_mean_and_the_sample_deviation():
    lines = [line(seed=seed, fd_vgg16=value) for seed, value in enumerate((1.0, 3.0))]
    assert report.spread(lines, "fd_vgg16") == Spread(2.0, pytest.approx(2**0.5), 2)
    assert report.spread(lines[:1], "fd_vgg16") == Spread(1.0, None, 1) and report.spread(lines, "kid") is None
    assert report.spread([line(seed=None, fd_vgg16=1.0)], "fd_vgg16") == Spread(1.0, 0.0, 1)


def test_the_best_is_bold_and_what_is_within_two_standard_errors_counts_as_equal():
    column = {
        "best": Spread(10.0, 0.3, 5),
        "near": Spread(10.5, 0.6, 5),  # standard error sqrt(.09 / 5 + .36 / 5) = .3: less than 2 away
        "far": Spread(10.7, 0.6, 5),  # 2.3 away, and within 2 deviations
        "once": Spread(10.5, None, 1),  # .3 as the best, so .329: less than 2 away
        "seedless": Spread(10.5, 0.0, 1),  # .134: 3.7 away
        "grey": Spread(9.0, 0.0, 1),
        "none": None,
    }
    assert report.cells(column, FIGURES["fd_vgg16"], {*column} - {"grey"}) == {
        "best": "**10.0 ± 0.3**",
        "near": "≈ 10.5 ± 0.6",
        "far": "10.7 ± 0.6",
        "once": "≈ 10.5",
        "seedless": "10.5",
        "grey": "9.0",
        "none": "",
    }
    assert report.cells(column, FIGURES["psnr"], {"best", "near"})["near"] == "**10.50 ± 0.60**"  # higher is better
    assert report.cells(column, FIGURES["seconds"], {"best", "near"})["best"] == "10.000 ± 0.300"
    assert report.cells(column, FIGURES["fd_vgg16"], {"best"})["best"] == "10.0 ± 0.3"  # no rival


def test_a_table_has_a_row_each_and_leaves_out_columns_that_nobody_has():
    lines = [line("a", fd_vgg16=3.0, seed=0), line("a", fd_vgg16=5.0, seed=1), line("b", fd_vgg16=9.0, seed=None)]
    columns = [("FD", "fd_vgg16", lines), ("KID", "kid", lines)]
    assert report.table([*lines, line("floor", kind="vq_reconstruction")], columns).splitlines() == [
        "|  | FD |",
        "| --- | --- |",
        "| a | **4.0 ± 1.4** |",
        "| b | 9.0 |",
        "| floor |  |",
    ]


def test_rows_that_differ_in_total_iter_alone_make_a_curve():
    def steps(total, **others):
        return {"total_iter": total, "sweet_spot": total, "top_k": 0} | others

    lines = [line(f"T{t}", decoding=steps(t), seed=seed, fd_vgg16=t + seed) for t in (8, 2) for seed in (0, 2)]
    lines += [line("other", decoding=steps(4, top_k=5)), line("early", decoding=steps(9, sweet_spot=3))]
    found = report.by_total_iter({"box": lines, "half": lines[:2]})
    assert set(found) == {"box"} and set(found["box"]) == {"T8"}
    assert [(t, value.mean) for t, value in found["box"]["T8"].items()] == [(2, 3.0), (8, 9.0)]


def test_a_curve_over_total_iter_is_drawn(tmp_path):
    lines = [
        line(f"T{t}", family, decoding={"total_iter": t, "sweet_spot": t}, fd_vgg16=10.0 + t)
        for family in ("box", "half")
        for t in (1, 2, 8)
    ]
    report.write_report(tmp_path, lines, {"command": "x"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fd.png", "results.md", "total_iter.png"]
    assert (tmp_path / "total_iter.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_tables_are_written_and_the_log_says_what_is_missing(tmp_path, monkeypatch, caplog):
    original = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    report.write_report(tmp_path, [line()], {"command": "x"})
    assert [path.name for path in tmp_path.iterdir()] == ["results.md"]
    assert "matplotlib (pip install -r requirements-dev.txt)" in caplog.text


def test_a_report_of_whole_images_alone_has_no_plots(tmp_path):
    report.write_report(tmp_path, [line(family="whole", kind="vq_reconstruction", psnr=24.5, code_usage=1.0)], {"n": 8})
    text = (tmp_path / "results.md").read_text()
    assert "| a | 24.50 | 1.0 | 1.000 |" in text and [path.name for path in tmp_path.iterdir()] == ["results.md"]


def test_decoding_seeds_are_told_by_family_where_they_differ():
    lines = [line("a", "walk", seed=0), line("a", "walk", seed=1), line("a", "box", seed=0), line("b", "walk", seed=2)]
    none = [line("Telea", "walk", seed=None)]
    assert report.decoding_seeds(lines + none) == "a: walk 0, 1, box 0; b: 2"


def test_a_line_that_is_there_is_not_added_again(tmp_path):
    line = Line("ours", "box", 0, 5, "key", {"psnr": 1.0}, {"kind": "inpainting"})
    for other in (line, line, Line("ours", "box", 0, 5, "key", {"psnr": 2.0}, {"kind": "inpainting"})):
        report.add_line(tmp_path / "rows.csv", other)
    assert report.read_lines(tmp_path / "rows.csv") == [line]


def test_a_name_with_odd_line_ends_comes_back_as_it_was(tmp_path):
    line = Line("a\u2028b\x0bc\r\nd", "walk", 0, 2, "key", {"psnr": 1.5}, {"kind": "telea"})
    report.write_lines(tmp_path / "rows.csv", [line])
    assert report.read_lines(tmp_path / "rows.csv") == [line]
