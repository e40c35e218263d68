"""What the figures show: the numbers and pixels in them, not that they can be drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vae_fast import plots
from vae_fast.trainer import History, HistoryRow

BLACK, WHITE, NOTHING = (0, 0, 0, 255), (255, 255, 255, 255), (0, 0, 0, 0)


def history(samples: list[int], *, test: bool = True) -> History:
    rows = []
    for i, count in enumerate(samples):
        train = (-(200.0 - i) - 5, -(200.0 - i), 5.0)
        tested = (-(190.0 - i) - 6, -(190.0 - i), 6.0) if test else (None, None, None)
        rows.append(HistoryRow(count, count // 100, count / 1000, *train, *tested))
    return History(rows)


def lines(ax) -> dict[str, np.ndarray]:
    return {line.get_label().split()[0].strip(","): line.get_xydata() for line in ax.get_lines()}


def pixels(figure) -> np.ndarray:
    (image,) = figure.axes[0].get_images()
    return np.asarray(image.get_array())


class ShowsItsLatents(torch.nn.Module):
    """A model whose "image" of z is z itself, squeezed into [0, 1]: pixel j shows unit j."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.one = torch.nn.Parameter(torch.ones(()))

    def decode_mean(self, z: torch.Tensor) -> torch.Tensor:
        return torch.special.ndtr(z)

    def sample(self, n: int, *, seed: int) -> torch.Tensor:
        return torch.linspace(0, 1, n)[:, None].expand(n, self.latent_dim)


class TestTile:
    def test_image_k_stands_in_row_k_div_ncols_and_column_k_mod_ncols(self) -> None:
        images = np.zeros((7, 2 * 3))
        for k in range(7):
            images[k] = k / 10
        picture = plots.tile(images, (2, 3), ncols=3)
        for k in range(7):
            row, column = divmod(k, 3)
            cell = picture[row * 3 : row * 3 + 2, column * 4 : column * 4 + 3]
            assert (cell == (*3 * (round(255 * k / 10),), 255)).all()

    def test_gaps_and_places_without_an_image_are_transparent(self) -> None:
        picture = plots.tile(np.ones((3, 4)), (2, 2), ncols=2, gap=1)
        assert picture.shape == (5, 5, 4)
        assert (picture[2] == NOTHING).all() and (picture[:, 2] == NOTHING).all()
        assert (picture[3:, 3:] == NOTHING).all()

    def test_pixels_of_an_image_run_row_by_row(self) -> None:
        picture = plots.tile(np.array([[0, 1, 0, 0, 0, 0]]), (2, 3))
        assert tuple(picture[0, 1]) == WHITE and tuple(picture[1, 0]) == BLACK

    def test_values_beyond_the_range_are_clipped(self) -> None:
        picture = plots.tile([[-3.0, 1.0, 2.0, 9.0]], (1, 4), value_range=(1.0, 3.0))
        assert picture[0, :, 0].tolist() == [0, 0, 128, 255]

    def test_colours_stay_colours(self) -> None:
        assert tuple(plots.tile([[1.0, 0.5, 0.0]], (1, 1, 3))[0, 0]) == (255, 128, 0, 255)

    def test_images_on_any_device_and_of_any_shape_are_taken(self) -> None:
        stack = torch.rand(4, 8, 8)
        assert (plots.tile(stack) == plots.tile(stack.reshape(4, 64).numpy(), (8, 8))).all()

    @pytest.mark.parametrize("shape", [(8, 9), (8,), (4, 4, 4), (0, 64)])
    def test_a_shape_that_does_not_fit_is_refused_with_both(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"image_shape: got .*wanted .*64 pixel values"):
            plots.tile(np.zeros((1, 64)), shape)

    @pytest.mark.parametrize(
        ("width", "shape"),
        [(784, (28, 28)), (64, (8, 8)), (560, (28, 20)), (49, None), (4, None), (500, None)],
    )
    def test_squares_from_8_by_8_and_frey_face_are_guessed(
        self, width: int, shape: tuple[int, int] | None
    ) -> None:
        assert plots.image_shape(width) == shape
        if shape is None:
            with pytest.raises(ValueError, match=f"image_shape: got None and {width} features"):
                plots.tile(np.zeros((1, width)))

    def test_a_png_file_holds_exactly_these_pixels(self, tmp_path: Path) -> None:
        from matplotlib.image import imread

        picture = plots.tile(np.linspace(0, 1, 6 * 64).reshape(6, 64), ncols=3)
        (tmp_path / "a.png").write_bytes(plots.png(picture))
        assert (np.rint(255 * imread(tmp_path / "a.png")).astype(np.uint8) == picture).all()


class TestPaperCurve:
    @pytest.mark.parametrize(
        ("latents", "at_100_million"), [(3, -133.4), (5, -119.1), (10, -103.7), (20, -100.1), (200, -100.2)]
    )
    def test_it_ends_where_the_paper_does(self, latents: int, at_100_million: float) -> None:
        paper = plots.paper_curve(latents)
        assert paper is not None
        assert paper.at(1e8) == pytest.approx(at_100_million, abs=0.06)

    def test_it_is_at_minus_124_after_a_million_samples(self) -> None:
        paper = plots.paper_curve(20)
        assert paper is not None and paper.at(1e6) == pytest.approx(-124.2, abs=0.05)

    def test_nothing_is_claimed_outside_the_drawing(self) -> None:
        paper = plots.paper_curve(20)
        assert paper is not None and paper.at(1000) is None and paper.at(1e12) is None
        assert plots.paper_curve(7) is None and plots.paper_curve(None) is None


class TestCurves:
    def test_lines_are_the_values_of_the_history(self) -> None:
        rows = history([1000, 2000, 10_000])
        bound, reconstruction, kl = plots.curves(rows).axes
        columns = rows.to_dict()
        for ax, term, sign in ((bound, "bound", 1), (reconstruction, "log_likelihood", -1), (kl, "kl", 1)):
            drawn = lines(ax)
            for name in ("train", "test"):
                assert drawn[name][:, 0].tolist() == columns["samples"]
                assert drawn[name][:, 1].tolist() == [sign * value for value in columns[f"{name}_{term}"]]
            assert ax.get_xscale() == "log"

    def test_the_legend_says_the_last_values(self) -> None:
        legend = plots.curves(history([1000, 2000])).axes[0].get_legend()
        assert [text.get_text() for text in legend.get_texts()] == ["test  −195.00", "train  −204.00"]

    def test_without_test_data_there_is_no_test_line(self) -> None:
        for ax in plots.curves(history([1000, 2000], test=False)).axes:
            assert lines(ax).keys() == {"train"}

    def test_the_paper_is_drawn_where_this_run_has_been_and_no_further(self) -> None:
        paper = plots.paper_curve(20)
        assert paper is not None
        drawn = lines(plots.curves(history([40_000, 1_000_000]), paper).axes[0])["paper"]
        assert drawn[:, 0].max() == 1e6 and (np.diff(drawn[:, 0]) > 0).all()
        assert drawn[0].tolist() == [paper.samples[0], paper.test_bound[0]]
        assert drawn[-1].tolist() == pytest.approx([1e6, -124.2], abs=0.05)

    def test_a_run_too_short_for_the_paper_is_drawn_alone(self) -> None:
        drawn = lines(plots.curves(history([1000, 2000]), plots.paper_curve(20)).axes[0])
        assert "paper" not in drawn

    def test_axes_name_their_units(self) -> None:
        bound, _, kl = plots.curves(history([1000, 2000])).axes
        assert bound.get_ylabel() == "nats per datapoint"
        assert bound.get_xlabel() == kl.get_xlabel() == "training samples seen"

    def test_huge_values_at_the_start_do_not_flatten_the_rest(self) -> None:
        rows = history([1000, 2000, 50_000, 100_000]).rows
        wild = HistoryRow(10, 1, 0.0, -9e5, -9e5, 1.0, -9e5, -9e5, 1.0)
        low, high = plots.curves(History([wild, *rows])).axes[0].get_ylim()
        assert high - low < 100

    def test_one_row_is_enough_and_none_is_refused(self) -> None:
        assert len(lines(plots.curves(history([500])).axes[0])["test"]) == 1
        with pytest.raises(ValueError, match="history: got an empty one"):
            plots.curves(History())


class TestReconstructions:
    def test_each_original_is_above_its_reconstruction(self) -> None:
        x, xhat = np.zeros((5, 64)), np.zeros((5, 64))
        for k in range(5):
            x[k], xhat[k] = (10 + k) / 255, (100 + k) / 255
        picture = pixels(plots.reconstructions(x, xhat, ncols=3))
        band = 8 + 1 + 8 + 3  # original, seam, reconstruction, and the wider gap before the next pair
        for k in range(5):
            row, column = divmod(k, 3)
            top, left = row * band, column * 9
            assert (picture[top : top + 8, left : left + 8, 0] == 10 + k).all()
            assert (picture[top + 9 : top + 17, left : left + 8, 0] == 100 + k).all()

    def test_different_shapes_are_refused_with_both(self) -> None:
        with pytest.raises(ValueError, match=r"xhat: got shape \[3, 64\], wanted .*\[2, 64\]"):
            plots.reconstructions(np.zeros((2, 64)), np.zeros((3, 64)))


class TestStacked:
    def test_image_k_of_each_part_is_below_that_of_the_part_before(self) -> None:
        parts = {"noisy": np.ones((3, 64)), "denoised": np.full((3, 64), 0.4), "clean": np.zeros((3, 64))}
        figure = plots.stacked(parts, ncols=3)
        picture = pixels(figure)
        assert picture.shape == (3 * 8 + 2, 3 * 9 - 1, 4)
        assert picture[[0, 9, 18], 9, 0].tolist() == [255, 102, 0]
        assert figure.axes[0].get_title(loc="left") == "Noisy, denoised, clean"


class TestSamples:
    def test_a_square_number_fills_a_square_whatever_the_shape_of_the_images(self) -> None:
        picture = pixels(plots.samples(ShowsItsLatents(8), 16, image_shape=(2, 4)))
        assert picture.shape == (4 * 3 - 1, 4 * 5 - 1, 4)
        assert picture[::3, 0, 0].tolist() == [round(255 * k / 15) for k in (0, 4, 8, 12)]


class TestManifold:
    """The image of z shows the prior's distribution function at z, so cell i of n must show (i + 1/2) / n."""

    def test_units_grow_to_the_right_and_upwards_by_equal_shares_of_the_prior(self) -> None:
        n = 5
        picture = pixels(plots.manifold(ShowsItsLatents(2), n, image_shape=(1, 2))).reshape(n, n, 2, 4)
        shares = [round(255 * (i + 0.5) / n) for i in range(n)]
        for i in range(n):
            assert picture[i, :, 0, 0].tolist() == pytest.approx(shares, abs=1)
            assert picture[:, i, 1, 0].tolist() == pytest.approx(shares[::-1], abs=1)

    def test_the_two_most_active_units_move_and_the_others_stay_at_zero(self) -> None:
        figure = plots.manifold(
            ShowsItsLatents(4), 3, variance=torch.tensor([0.1, 0.9, 0.0, 0.5]), image_shape=(1, 4)
        )
        picture = pixels(figure).reshape(3, 3, 4, 4)[..., 0]
        assert (picture[..., [0, 2]] == 128).all()
        assert picture[0, :, 1].tolist() == pytest.approx([42, 128, 212], abs=1)
        assert picture[:, 0, 3].tolist() == pytest.approx([212, 128, 42], abs=1)
        assert figure.axes[0].get_title(loc="left") == "Most active latents (1, 3), others at 0"

    def test_without_the_variances_more_than_two_latents_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"variance: got None, wanted .* each of the 4 latents"):
            plots.manifold(ShowsItsLatents(4), 3, image_shape=(1, 4))

    def test_one_latent_gives_a_row(self) -> None:
        picture = pixels(plots.manifold(ShowsItsLatents(1), 4, image_shape=(1, 1)))
        assert picture[0, :, 0].tolist() == pytest.approx([32, 96, 159, 223], abs=1)


class TestLatentActivity:
    def test_bars_are_the_variances_most_active_first(self) -> None:
        variance = torch.tensor([0.5, 0.002, 1.0, 0.02])
        (ax,) = plots.latent_activity(variance).axes
        tops = [bar.get_y() + bar.get_height() for bar in ax.patches]
        assert tops == pytest.approx([1.0, 0.5, 0.02, 0.002])
        assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "0", "3", "1"]

    def test_it_counts_the_units_above_the_line_of_0_01(self) -> None:
        (ax,) = plots.latent_activity([0.5, 0.01, 1.0, 0.02]).axes
        assert ax.get_title(loc="left") == "3 of 4 latent units in use"
        (line,) = ax.get_lines()
        assert set(line.get_ydata()) == {0.01}
        assert len({bar.get_facecolor() for bar in ax.patches[:3]}) == 1
        assert ax.patches[3].get_facecolor() != ax.patches[0].get_facecolor()

    def test_units_without_any_variance_can_be_drawn(self) -> None:
        plots.latent_activity(torch.zeros(3)).savefig("/dev/null", format="png")


class TestLatents:
    MEAN = np.array([[0.1, 3.0, -1.0], [0.0, -3.0, 1.0], [0.1, 2.0, 0.5]])

    def test_points_are_the_means_on_the_two_units_that_vary_most(self) -> None:
        (ax,) = plots.latents(self.MEAN).axes
        (points,) = ax.collections
        np.testing.assert_allclose(points.get_offsets(), self.MEAN[:, [1, 2]])
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("E[z | x], latent 1", "E[z | x], latent 2")

    def test_two_units_are_in_the_order_of_the_manifold(self) -> None:
        (ax,) = plots.latents(self.MEAN[:, [0, 1]]).axes
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("E[z | x], latent 0", "E[z | x], latent 1")

    def test_classes_have_colours_and_stand_at_their_medians(self) -> None:
        (ax,) = plots.latents(self.MEAN, labels=[7, 5, 7]).axes
        colours = ax.collections[0].get_facecolors()
        assert (colours[0] == colours[2]).all() and (colours[0] != colours[1]).any()
        assert {text.get_text(): tuple(text.xy) for text in ax.texts} == {"5": (-3.0, 1.0), "7": (2.5, -0.25)}

    def test_too_few_labels_are_refused(self) -> None:
        with pytest.raises(ValueError, match="labels: got 2, wanted one for each of the 3"):
            plots.latents(self.MEAN, labels=[1, 2])

    def test_one_unit_is_a_histogram(self) -> None:
        (ax,) = plots.latents(self.MEAN[:, 1:2]).axes
        assert sum(bar.get_height() for bar in ax.patches) == 3


class TestFeatureRows:
    def test_values_in_0_to_1_are_shown_as_they_are(self) -> None:
        data, model = np.random.default_rng(0).random((2, 4, 6)).astype(np.float32)
        first, second, *_ = plots.feature_rows({"Data": data, "Model": model}).axes
        assert (first.get_images()[0].get_array() == data).all()
        assert (second.get_images()[0].get_array() == model).all()

    def test_others_in_standard_deviations_of_the_first_panel(self) -> None:
        data = np.random.default_rng(0).normal([5, -300, 0], [1, 50, 0], (50, 3)).astype(np.float32)
        first, second, *_ = plots.feature_rows({"Data": data, "Model": data + np.array([1, 50, 0])}).axes
        shown = np.asarray(first.get_images()[0].get_array())
        assert shown.mean(axis=0) == pytest.approx([0, 0, 0], abs=1e-5)
        assert shown.std(axis=0) == pytest.approx([1, 1, 0], abs=1e-5)
        difference = (np.asarray(second.get_images()[0].get_array()) - shown).mean(axis=0)
        assert difference == pytest.approx([1 / data[:, 0].std(), 50 / data[:, 1].std(), 0], rel=1e-4)


class TestMatplotlib:
    def test_pyplot_and_its_global_state_are_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import matplotlib

        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # any import of it fails
        names = [name for name in matplotlib.rcParams if name != "backend"]
        before = [matplotlib.rcParams[name] for name in names]
        plots.curves(history([10, 100]), plots.paper_curve(20)).savefig("/dev/null", format="svg")
        plots.latent_activity([1.0]).savefig("/dev/null", format="png")
        assert [matplotlib.rcParams[name] for name in names] == before

    def test_without_it_the_error_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match="pip install matplotlib"):
            plots.image_grid(np.zeros((1, 64)))

    def test_the_readers_own_style_does_not_reach_the_figures(self) -> None:
        import matplotlib

        with matplotlib.rc_context({"axes.facecolor": "black", "text.color": "red", "lines.linewidth": 9}):
            figure = plots.curves(history([10, 100]))
        assert figure.get_facecolor() == (1, 1, 1, 1)
        assert {line.get_linewidth() for line in figure.axes[0].get_lines()} == {1.8}


def test_most_active_units_come_in_order_of_their_variance() -> None:
    assert plots.most_active(torch.tensor([0.1, 3.0, 0.2]), 3) == [1, 2, 0]
    assert plots.most_active([0.0, 0.0]) == [0, 1]
