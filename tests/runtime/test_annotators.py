import numpy as np
import pytest
from PIL import Image

from controlrt.runtime.annotators import annotator_named_in, canny
from controlrt.runtime.errors import ParameterError


def test_edges_lie_on_the_outline() -> None:
    cv2 = pytest.importorskip("cv2", reason="without the extra [annotate] there is no OpenCV")
    picture = np.zeros((64, 64, 3), np.uint8)
    cv2.circle(picture, (32, 32), 20, (255, 120, 0), -1)
    edges = np.asarray(canny(Image.fromarray(picture)))
    assert set(np.unique(edges)) == {0, 255}
    rows, columns = np.nonzero(edges[..., 0])
    assert len(rows) > 80
    distance = np.hypot(rows - 32, columns - 32)
    assert distance.min() > 18
    assert distance.max() < 22


@pytest.mark.parametrize("thresholds", [(-1, 5), (200, 100), (float("nan"), 1), (1, float("inf"))])
def test_bad_thresholds(thresholds: tuple[float, float]) -> None:
    with pytest.raises(ParameterError, match="LOW,HIGH"):
        canny(Image.new("RGB", (8, 8)), *thresholds)


@pytest.mark.parametrize(
    ("texts", "annotator"),
    [
        (("canny",), "canny"),
        (("edges", "lllyasviel/control_v11p_sd15_canny"), "canny"),
        (("Canny-2", "x"), "canny"),
        (("uncanny", "models/mask"), None),
    ],
)
def test_the_annotator_is_a_word_of_name_or_source(texts: tuple[str, ...], annotator: str | None) -> None:
    assert annotator_named_in(*texts) == annotator
