// Package top is the step that shows in a terminal what the sentinel's page
// shows in a browser.
package top

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/sentinel"
)

const (
	// timeout of one look at the sentinel.
	timeout = 10 * time.Second
	// maxStatus bounds its answer: 600 moments and 32 incidents are 300 KB.
	maxStatus = 8 << 20
	// width of the bars and the line of the past.
	width = 40
	// shown incidents, versions and flagged inputs, the newest.
	shown = 5
)

// Command is the step.
func Command() *cobra.Command {
	var (
		address string
		every   time.Duration
		once    bool
	)
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Show what a sentinel sees, in the terminal",
		Long: `Show a sentinel's state, alarm levels, live accuracy, request rate, the last
flagged inputs with both models' answers, incidents with their timeline, and
versions with their security curve, and again at an interval until interrupted.
With --once, or -o json, it looks once and prints.`,
		Example: `  temper top
  temper top --sentinel http://sentinel:8090 --every 2s
  temper top --once -o json | jq .attack`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, st := cmd.Context(), step.From(cmd)
			u, err := url.Parse(address)
			if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
				return step.BadInput(fmt.Errorf("--sentinel %q: must be an http or https URL, such as http://127.0.0.1:8090", address))
			}
			if every <= 0 {
				return step.BadInput(fmt.Errorf("--every %v: must be above 0", every))
			}
			format, err := cmd.Flags().GetString("format")
			if once || err == nil && format == "json" {
				s, flagged, err := look(ctx, u)
				if err != nil {
					return err
				}
				var b strings.Builder
				Draw(&b, s, flagged)
				return st.Print(b.String(), s)
			}
			for {
				s, flagged, err := look(ctx, u)
				var b strings.Builder
				b.WriteString("\x1b[H\x1b[2J") // from the top of an empty screen
				switch {
				case ctx.Err() != nil:
					return nil
				case err != nil:
					fmt.Fprintln(&b, err)
				default:
					Draw(&b, s, flagged)
				}
				if _, err := io.WriteString(cmd.OutOrStdout(), b.String()); err != nil {
					return err
				}
				select {
				case <-ctx.Done():
					return nil
				case <-time.After(every):
				}
			}
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&address, "sentinel", "http://127.0.0.1:8090", "the sentinel's address")
	flags.DurationVar(&every, "every", time.Second, "time between two looks")
	flags.BoolVar(&once, "once", false, "look once and print")
	return cmd
}

// look asks for the status and the last flagged requests, newest first.
func look(ctx context.Context, u *url.URL) (s *sentinel.Status, flagged []sentinel.Flagged, err error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	s = &sentinel.Status{}
	if err := get(ctx, u.JoinPath("status").String(), s); err != nil {
		return nil, nil, err
	}
	return s, flagged, get(ctx, u.JoinPath("evidence").String(), &flagged)
}

func get(ctx context.Context, address string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return step.BadInput(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return step.Unavailable(fmt.Errorf("the sentinel does not answer: %w", err))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return step.Unavailable(fmt.Errorf("%s answered %s: is it a sentinel?", address, resp.Status))
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxStatus)).Decode(into); err != nil {
		return step.BadInput(errors.New(address + " is not what a sentinel says: is it one?"))
	}
	return nil
}

// Draw writes the status for a person, without colours: it is read through
// pipes and by screen readers too.
func Draw(w io.Writer, s *sentinel.Status, flagged []sentinel.Flagged) {
	row := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%-14s %s\n", name, plain(fmt.Sprintf(format, args...)))
	}
	row("state", "%s", strings.ToUpper(s.State))
	row("watching", "%s %s", s.Model, short(s.Digest))
	for _, problem := range []string{s.Problem, s.Circuit} {
		if problem != "" {
			row("!", "%s", problem)
		}
	}
	fmt.Fprintln(w)
	level := func(name string, l sentinel.Level) {
		row(name, "%s %5.1f of %.0f", bar(l.Level, l.Limit), l.Level, l.Limit)
	}
	level("attack", s.Attack)
	level("drift", s.Drift)
	if s.Accuracy != nil {
		level("labels", *s.Accuracy)
	}
	row("past", "%s", past(s.History, s.Attack.Limit))
	fmt.Fprintln(w)
	row("accuracy", "%s by %d labels, %d wrong", percent(s.Right), s.Labels, s.Errors)
	row("guard agrees", "%s", percent(s.Agreed))
	row("requests", "%d, %s a second", s.Requests, rate(s.History))
	row("flagged", "%d hostile, %d unusual", s.Flagged, s.Shifted)
	row("defences", "%d of %d in 24 hours", s.Begun, s.Budget)
	fmt.Fprintln(w)

	for _, f := range flagged[:min(len(flagged), shown)] {
		row("input", "request %d  model %s, guard %s, score %.2f", f.Request, class(s, f.Served), class(s, f.Guard), f.Score)
	}
	if len(flagged) > 0 {
		fmt.Fprintln(w)
	}

	incidents := s.Incidents
	if s.Open != nil {
		incidents = append(incidents[:len(incidents):len(incidents)], *s.Open)
	}
	for n := len(incidents) - 1; n >= max(0, len(incidents)-shown); n-- {
		i := incidents[n]
		outcome := i.Outcome
		if outcome == "" {
			outcome = "open"
		}
		row("incident", "%s  %s, %s  (request %d, share %.0f%%, epsilon %v)", i.Opened.Format(time.DateTime), i.Cause, outcome, i.Request, 100*i.Share, i.Epsilon)
		for _, e := range i.Timeline {
			row("", "%s %s %s", e.At.Format(time.TimeOnly), e.Name, e.Text)
		}
	}
	if len(incidents) > 0 {
		fmt.Fprintln(w)
	}
	for n := len(s.Versions) - 1; n >= max(0, len(s.Versions)-shown); n-- {
		v := s.Versions[n]
		signed := "no signed report"
		if len(v.SignedBy) > 0 {
			signed = "signed by " + strings.Join(v.SignedBy, ", ")
		}
		row("version", "%s %s  clean %.1f%%, robust %.1f%% at %v  %s", v.Version, short(v.Digest), 100*v.Clean, 100*v.Robust, v.Epsilon, signed)
		if len(v.Curve) == 0 {
			continue
		}
		var curve []string
		for _, p := range v.Curve {
			curve = append(curve, fmt.Sprintf("%.1f%% at %v", 100*p.Accuracy, p.Epsilon))
		}
		row("", "accuracy by epsilon: %s", strings.Join(curve, ", "))
	}
}

// plain leaves no control character to the terminal: texts come from outside.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.Is(unicode.Cf, r) {
			return '?'
		}
		return r
	}, s)
}

// class is a class's name, or its number where it has none.
func class(s *sentinel.Status, c int) string {
	if c >= 0 && c < len(s.Classes) {
		return s.Classes[c]
	}
	return strconv.Itoa(c)
}

func short(digest string) string { return digest[:min(len(digest), len("sha256:")+12)] }

func percent(v *float64) string {
	if v == nil {
		return "-"
	}
	return fmt.Sprintf("%.1f%%", 100**v)
}

func bar(v, limit float64) string {
	n := 0
	if limit > 0 {
		n = int(min(max(v/limit, 0), 1) * width)
	}
	return "[" + strings.Repeat("#", n) + strings.Repeat(".", width-n) + "]"
}

// past draws the alarm's level over time, full at its limit.
func past(history []sentinel.Moment, limit float64) string {
	steps := []rune("▁▂▃▄▅▆▇█")
	if len(history) == 0 || limit <= 0 {
		return ""
	}
	var out []rune
	for i := range min(width, len(history)) {
		lo, hi := i*len(history)/min(width, len(history)), (i+1)*len(history)/min(width, len(history))
		top := 0.0
		for _, m := range history[lo:max(hi, lo+1)] {
			top = max(top, m.Attack)
		}
		out = append(out, steps[int(min(max(top/limit, 0), 1)*float64(len(steps)-1))])
	}
	return string(out)
}

func rate(history []sentinel.Moment) string {
	if len(history) < 2 {
		return "-"
	}
	a, b := history[len(history)-2], history[len(history)-1]
	seconds := b.At.Sub(a.At).Seconds()
	if seconds <= 0 || b.Requests < a.Requests {
		return "-"
	}
	return fmt.Sprintf("%.1f", float64(b.Requests-a.Requests)/seconds)
}
