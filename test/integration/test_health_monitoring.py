"""The example files for Prometheus and Grafana: Prometheus reads dovetail-health with
them, every query of theirs finds something, and alerts come when they should."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import urllib.parse
import urllib.request

from cluster import Daemon, free_port, wait_for
from test_health import FAST, OUTAGE, diverge, wait_ok, wait_state
from test_health_page import Ports
from test_verify import filled

FILES = os.path.join(os.path.dirname(__file__), "..", "..", "plugin",
                     "example-config", "monitoring")
RULES = os.path.join(FILES, "dovetail.rules.yml")
DASHBOARD = os.path.join(FILES, "dovetail-dashboard.json")
PROGRAMS = os.environ.get("DOVETAIL_TEST_PROGRAMS",
                          "/var/cache/dovetail/programs")
CONFIG = """
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [%s]
scrape_configs:
  - job_name: dovetail
    static_configs: [{targets: %s}]
"""


def program(name):
    path = shutil.which(name) or os.path.join(PROGRAMS, "usr", "bin", name)
    assert os.path.exists(path), \
        "%s does not exist: build-aux/check puts it there" % path
    return path


class Prometheus(Daemon):
    def __init__(self, targets, rules=RULES):
        super().__init__()
        self.tmp = tempfile.TemporaryDirectory(prefix="dovetail-prometheus.")
        self.url = "http://127.0.0.1:%d/" % free_port()
        config = os.path.join(self.tmp.name, "prometheus.yml")
        with open(config, "w") as f:
            f.write(CONFIG % (json.dumps(os.path.abspath(rules)),
                              json.dumps(targets)))
        self.spawn([program("prometheus"), "--config.file=" + config,
                    "--storage.tsdb.path=" + self.tmp.name + "/data",
                    "--web.listen-address=" + self.url.split("/")[2]],
                   self.ready, os.path.join(self.tmp.name, "log"))

    def ready(self):
        try:
            return urllib.request.urlopen(self.url + "-/ready",
                                          timeout=5).status == 200
        except OSError:
            return False

    def api(self, path, **params):
        with urllib.request.urlopen("%sapi/v1/%s?%s" % (
                self.url, path, urllib.parse.urlencode(params)),
                timeout=10) as answer:
            answer = json.load(answer)
        assert answer["status"] == "success"
        return answer["data"]

    def query(self, expr):
        return self.api("query", query=expr)["result"]

    def alerts(self):
        return {alert["labels"]["alertname"]: alert
                for alert in self.api("alerts")["alerts"]}

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.end(15)
        self.tmp.cleanup()


def queries():
    """(panel, expression), with Grafana's variables as it would set them."""
    with open(DASHBOARD) as f:
        dashboard = json.load(f)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            expr = target["expr"]
            for name, value in (("$job", "dovetail"), ("$instance", ".*"),
                                ("$__rate_interval", "1m")):
                expr = expr.replace(name, value)
            assert "$" not in expr, expr
            yield panel["title"], expr
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            expr = re.fullmatch(r"label_values\((.*), \w+\)",
                                variable["query"])[1]
            yield variable["name"], expr.replace("$job", "dovetail")


def selectors():
    """What the rules look at: name{labels}."""
    with open(RULES) as f:
        for expr in re.findall(r"(?m)^ +expr: (.*)$", f.read()):
            for name, labels in re.findall(
                    r"\b((?:dovetail_\w+|up)\b)(\{[^}]*\})?", expr):
                yield name + labels


def test_files(new_cluster):
    ports = Ports()
    cluster = new_cluster(["sdbox", "maildir"], settings=FAST, conf=ports)
    a, b = cluster.nodes
    user = filled(cluster)
    user.wait_equal()
    wait_ok(a, b)
    targets = ["127.0.0.1:%d" % http for http, _ in ports.ports]
    with Prometheus(targets) as prometheus:
        wait_for(lambda: len(prometheus.query("up == 1")) == 2,
                 "Prometheus to read both nodes")
        wait_for(lambda: len(prometheus.query(
            "dovetail_last_verify_timestamp_seconds")) == 2,
            "the first verification of each", 60)
        # for rates
        wait_for(lambda: min((int(float(r["value"][1])) for r in prometheus.query(
            "count_over_time(up[1m])")), default=0) >= 3, "some samples")

        # each query finds something, of both nodes
        found = list(queries())
        assert len(found) > 20
        for title, expr in found:
            result = prometheus.query(expr)
            assert len({r["metric"].get("instance") for r in result}) == 2, (
                title, expr, result)
        found = list(selectors())
        assert len(found) > 14
        for selector in found:
            assert prometheus.query(selector), selector

        # all is well, and no alert is there
        groups = prometheus.api("rules")["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        wait_for(lambda: all(
            rule["health"] == "ok" for group in
            prometheus.api("rules")["groups"] for rule in group["rules"]),
            "all rules to be evaluated")
        assert len(rules) == 14
        assert prometheus.alerts() == {}

        # Things go wrong.
        diverge(user)
        wait_for(lambda: "DovetailDiverged" in prometheus.alerts(),
                 "the alert")
        alert = prometheus.alerts()["DovetailDiverged"]
        assert alert["annotations"]["summary"] == \
            "1 mailboxes on %s differ from those of a" % targets[1]
        assert user.name not in json.dumps(prometheus.alerts())
        cluster.expect_errors(*OUTAGE)
        cluster.redis.stop()
        wait_state(a, "unprotected")
        wait_for(lambda: {"DovetailUnprotected", "DovetailRedisDown"} <=
                 set(prometheus.alerts()), "the alerts")
        assert "DovetailSilent" not in prometheus.alerts()
        with a.paused("dovetail-health"):
            wait_for(lambda: "DovetailSilent" in prometheus.alerts(),
                     "the silence to be noticed", 30)
        cluster.redis.start()
        wait_for(lambda: not {"DovetailUnprotected", "DovetailRedisDown"} &
                 set(prometheus.alerts()), "the alerts to go", 60)


# series and minute: the alerts that must be there, and nothing else
CASES = [
    ({"dovetail_health_state{instance='a',job='dovetail',direction='to',"
      "peer='b',dovetail_health_state='stalled'}": "0x5 1x20"},
     {4: [], 6: [], 9: ["DovetailStalled"]}),
    ({"dovetail_replication_lag_seconds{instance='a',job='dovetail',"
      "direction='to',peer='b'}": "59+1x30"},
     {5: [], 13: ["DovetailLagging"]}),
    ({"dovetail_replication_lag_seconds{instance='b',job='dovetail',"
      "direction='from',peer='a'}": "100x30"}, {20: []}),
    ({"dovetail_role_info{instance='a',job='dovetail',role='primary'}": "1x30",
      "dovetail_role_info{instance='b',job='dovetail',role='primary'}":
      "_x5 1x25"}, {4: [], 9: ["DovetailTwoPrimaries"]}),
    ({"dovetail_queue_bytes{instance='a',job='dovetail'}": "79+1x30",
      "dovetail_queue_max_bytes{instance='a',job='dovetail'}": "100x30"},
     {1: [], 9: ["DovetailQueueFillsUp"]}),
    ({"dovetail_rejected_entries_total{instance='a',job='dovetail',peer='b',"
      "direction='to'}": "0x10 1x40"}, {9: [], 13: ["DovetailRejected"],
                                        40: []}),
    ({"dovetail_report_age_seconds{instance='a',job='dovetail'}": "31x10"},
     {1: [], 3: ["DovetailNoNews"]}),
    ({"dovetail_health_actions_total{instance='a',job='dovetail',"
      "action='defer'}": "0x5 1+1x20"}, {5: [], 12: ["DovetailMailDeferred"]}),
    ({"dovetail_dirty_failing_users{instance='a',job='dovetail'}": "1x30"},
     {14: [], 16: ["DovetailFailing"]}),
]


def test_alerts():
    """When which alert comes, by promtool's own tests."""
    with open(RULES) as f:
        rules = re.findall(r"(?m)^ +- alert: (.*)$", f.read())
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "tests.yml")
        shutil.copy(RULES, directory)
        # JSON is YAML
        tests = [{
            "interval": "1m",
            "input_series": [{"series": series, "values": values}
                             for series, values in case.items()],
            "promql_expr_test": [{
                "expr": "count(ALERTS{alertname='%s',alertstate='firing'}) or "
                "vector(0)" % rule,
                "eval_time": "%dm" % minute,
                "exp_samples": [{"labels": "{}", "value": int(rule in wanted)}]
            } for minute, wanted in times.items() for rule in rules],
        } for case, times in CASES]
        with open(path, "w") as f:
            json.dump({"rule_files": ["dovetail.rules.yml"],
                       "evaluation_interval": "1m", "tests": tests}, f)
        for args in (["check", "rules", RULES], ["test", "rules", path]):
            done = subprocess.run([program("promtool"), *args], text=True,
                                  stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT)
            assert done.returncode == 0, done.stdout
