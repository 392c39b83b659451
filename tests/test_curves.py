"""The figure: drawn from metrics.jsonl, without a package."""
import json
import re
from xml.etree import ElementTree

from curves import HEIGHT, svg_curves


def log(folder, values, end=""):
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": i, "success": value, "leak": None}) for i, value in enumerate(values)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + end)


def test_curves_by_hand(tmp_path):
    """Means over seeds of running means, a band between the seeds; what was not measured is not drawn. The half line of
    a running training is left out, and a name needs no care."""
    run = tmp_path / "tiny <&"
    log(run / "planner-exec_only-seed0", [0.0, 1.0])
    log(run / "planner-exec_only-seed12.partial", [1.0, 1.0, 0.0], end='{"step"')
    log(run / "planner-tracelift-seed0", [0.5])
    text = svg_curves([run])
    assert ElementTree.fromstring(text).tag.endswith("svg") and "tiny &lt;&amp;: success" in text
    lines = [[float(pair.partition(",")[2]) / HEIGHT for pair in points.split()]
             for points in re.findall('polyline points="([^"]*)"', text)]
    assert lines == [[0.5, 0.25], [0.5], [], []]                          # success of both planners, leak of both
    band = re.search('polygon points="([^"]*)"', text)[1].split()
    assert [float(pair.partition(",")[2]) / HEIGHT for pair in band] == [1.0, 0.5, 0.0, 0.0]
    assert text.count(">exec_only</text>") == text.count(">tracelift</text>") == 1


def test_a_run_without_planners_is_an_empty_figure(tmp_path):
    assert "polyline" not in svg_curves([tmp_path])
