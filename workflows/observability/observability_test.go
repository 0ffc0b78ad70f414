// Package observability holds the dashboards and the alert rules, and checks
// that they ask for metrics and labels that exist.
package observability

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.yaml.in/yaml/v3"

	"github.com/temper-ml/temper/runners/step/sentinel"
	"github.com/temper-ml/temper/runners/step/serve"
)

type rules struct {
	Groups []struct {
		Name  string `yaml:"name"`
		Rules []struct {
			Alert       string            `yaml:"alert"`
			Expr        string            `yaml:"expr"`
			For         string            `yaml:"for,omitempty"`
			Labels      map[string]string `yaml:"labels"`
			Annotations map[string]string `yaml:"annotations"`
		} `yaml:"rules"`
	} `yaml:"groups"`
}

var (
	metricPattern = regexp.MustCompile(`\b(temper|process|go)_[a-z_]+`)
	// labelPattern finds the labels of {label="..."} and of by (label, ...).
	labelPattern = regexp.MustCompile(`([a-z_]+)(?:=~|!=|!~|=)"|by \(([a-z_, ]+)\)`)
)

// known are the metrics of server and sentinel, with the labels that Prometheus adds.
func known(t *testing.T) (metrics map[string]bool, labels map[string]bool) {
	t.Helper()
	descriptions := make(chan *prometheus.Desc, 1000)
	serve.Describe(descriptions)
	sentinel.Describe(descriptions)
	close(descriptions)
	metrics, labels = map[string]bool{}, map[string]bool{"instance": true, "job": true, "le": true}
	text := regexp.MustCompile(`fqName: "([^"]+)".*variableLabels: \{(.*)\}\}`)
	for d := range descriptions {
		m := text.FindStringSubmatch(d.String())
		if m == nil {
			t.Fatalf("%s", d)
		}
		metrics[m[1]] = true
		if strings.HasSuffix(m[1], "_duration_seconds") || strings.HasSuffix(m[1], "_score_seconds") { // a histogram
			metrics[m[1]+"_bucket"] = true
		}
		for _, l := range strings.FieldsFunc(m[2], func(r rune) bool { return strings.ContainsRune("{}, ", r) }) {
			labels[l] = true
		}
	}
	if !metrics["temper_model_ready"] || !metrics["temper_sentinel_ready"] || !labels["reason"] {
		t.Fatalf("%d metrics with the labels %v: the test looks at the wrong place", len(metrics), labels)
	}
	return metrics, labels
}

func check(t *testing.T, where, expr string, metrics, labels map[string]bool) {
	t.Helper()
	names := metricPattern.FindAllString(expr, -1)
	if len(names) == 0 {
		t.Errorf("%s: no metric in %s", where, expr)
	}
	for _, name := range names {
		if !metrics[name] {
			t.Errorf("%s: neither server nor sentinel has a metric %s", where, name)
		}
	}
	for _, m := range labelPattern.FindAllStringSubmatch(expr, -1) {
		for _, l := range strings.Split(m[1]+m[2], ",") {
			if !labels[strings.TrimSpace(l)] {
				t.Errorf("%s: no metric has the label %q", where, l)
			}
		}
	}
}

func TestCase40AlertsAskForWhatExists(t *testing.T) {
	metrics, labels := known(t)
	data, err := os.ReadFile("alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var r rules
	d := yaml.NewDecoder(bytes.NewReader(data))
	d.KnownFields(true)
	if err := d.Decode(&r); err != nil {
		t.Fatal(err)
	}
	var alerts []string
	for _, g := range r.Groups {
		for _, rule := range g.Rules {
			alerts = append(alerts, rule.Alert)
			check(t, rule.Alert, rule.Expr, metrics, labels)
			if _, err := time.ParseDuration(rule.For); rule.For != "" && err != nil {
				t.Errorf("%s: %v", rule.Alert, err)
			}
			if s := rule.Labels["severity"]; s != "critical" && s != "warning" {
				t.Errorf("%s: severity %q", rule.Alert, s)
			}
			if rule.Annotations["summary"] == "" || rule.Annotations["description"] == "" {
				t.Errorf("%s: no summary or description", rule.Alert)
			}
			if rule.Alert == "TemperChannelStale" && !strings.Contains(rule.Expr, "temper_model_promoted_timestamp_seconds") {
				t.Errorf("%s: %s", rule.Alert, rule.Expr)
			}
		}
	}
	for _, want := range []string{"TemperChannelStale", "TemperSourceUnreachable", "TemperModelRefused", "TemperNotReady", "TemperOverloaded",
		"TemperAttack", "TemperDrift", "TemperCircuitOpen", "TemperSentinelState", "TemperQuarantine"} {
		if !slices.Contains(alerts, want) {
			t.Errorf("no alert %s", want)
		}
	}
}

func TestDashboardsAskForWhatExists(t *testing.T) {
	uids := map[string]bool{}
	for _, file := range []string{"serving.json", "sentinel.json"} {
		uids[dashboard(t, file)] = true
	}
	if len(uids) != 2 {
		t.Errorf("two dashboards with the uids %v", uids)
	}
}

// dashboard checks one and returns its uid.
func dashboard(t *testing.T, file string) string {
	metrics, labels := known(t)
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		UID, Title string
		Panels     []struct {
			ID      int
			Title   string
			GridPos struct{ X, Y, W, H int }
			Targets []struct{ Expr string }
		}
		Templating struct {
			List []struct {
				Name  string
				Query json.RawMessage
			}
		}
	}
	if err := json.Unmarshal(data, &d); err != nil {
		t.Fatal(err)
	}
	variables := map[string]bool{"__rate_interval": true}
	for _, v := range d.Templating.List {
		variables[v.Name] = true
	}
	ids := map[int]bool{}
	for i, p := range d.Panels {
		if p.Title == "" || len(p.Targets) == 0 || ids[p.ID] {
			t.Errorf("panel %d: no title, no query, or an id twice", p.ID)
		}
		ids[p.ID] = true
		for _, target := range p.Targets {
			check(t, p.Title, target.Expr, metrics, labels)
			for _, m := range regexp.MustCompile(`\$(\w+)`).FindAllStringSubmatch(target.Expr, -1) {
				if !variables[m[1]] {
					t.Errorf("%s: no variable $%s", p.Title, m[1])
				}
			}
		}
		for _, q := range d.Panels[:i] {
			a, b := p.GridPos, q.GridPos
			if a.X < b.X+b.W && b.X < a.X+a.W && a.Y < b.Y+b.H && b.Y < a.Y+a.H {
				t.Errorf("%s lies over %s", p.Title, q.Title)
			}
		}
	}
	if d.UID == "" || len(d.Panels) < 10 {
		t.Errorf("%s: %q has %d panels", file, d.UID, len(d.Panels))
	}
	return d.UID
}

// The stock tool, where it is installed, agrees, and the alerts fire when they
// should (alerts_test.yaml).
func TestPromtool(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is not installed")
	}
	for _, args := range [][]string{{"check", "rules", "alerts.yaml"}, {"test", "rules", "alerts_test.yaml"}} {
		if out, err := exec.Command(promtool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}
