package promote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/interval"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/graph"
	"github.com/temper-ml/temper/models/zoo"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
	"github.com/temper-ml/temper/runners/step/serve/inference"
	"github.com/temper-ml/temper/signing/channel"
	"github.com/temper-ml/temper/signing/store"
	"github.com/temper-ml/temper/signing/verify"
)

// Watch looks at the endpoints after a promotion.
type Watch struct {
	Endpoints []string      // URLs of servers of the Open Inference Protocol
	Name      string        // of the model there
	Timeout   time.Duration // for all of them to serve the new model
	Samples   int           // test images to send as they are, and attacked
	Attack    string        // "" for the first of the policy
	Dataset   string        // "" for that of the policy's model

	unnamed bool // the endpoints do not say what they serve: KServe's
}

func (w *Watch) flags(flags *pflag.FlagSet) {
	flags.StringSliceVar(&w.Endpoints, "endpoint", nil, "servers to watch afterwards, such as http://serve:8080")
	flags.StringVar(&w.Name, "endpoint-model", "", "the model's name there (default: the last part of the repository's)")
	flags.DurationVar(&w.Timeout, "endpoint-timeout", 2*time.Minute, "how long all endpoints may take to serve the new model")
	step.Int(flags, &w.Samples, "endpoint-samples", 200, 20, 10_000, "test images to send to each endpoint, as they are and attacked")
	flags.StringVar(&w.Attack, "endpoint-attack", "", "how to attack them (default: the policy's first attack)")
	flags.StringVar(&w.Dataset, "endpoint-dataset", "", "data set of the test images (default: that of the policy's model)")
}

const (
	// pollEvery is how often an endpoint is asked which model it serves.
	pollEvery = 200 * time.Millisecond
	// inARow is how often it must name the new one: behind a service there may
	// be several servers.
	inARow = 5
	// maxMetadata is many times what an endpoint says about its model.
	maxMetadata = 64 << 10
	// batch is how many images are attacked, and sent, at a time.
	batch = 50
	// maxDifferent is the share of answers that may differ from what the signed
	// model answers here: other arithmetic rounds differently.
	maxDifferent = 0.01
)

// fresh connects anew each time: behind a service the next answer may be from
// another server.
var fresh = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 30 * time.Second}

// Live is what the endpoints answered, all together.
type Live struct {
	Samples        int     `json:"samples"` // images, each sent as it is and attacked
	Attack         string  `json:"attack"`
	CleanAccuracy  float64 `json:"clean_accuracy"`
	RobustAccuracy float64 `json:"robust_accuracy"` // under this attack
	Different      int     `json:"different"`       // answers that are not the signed model's
}

// examples are what is sent to the endpoints, and what must come back.
type examples struct {
	shape      nn.Shape
	labels     []uint8   // true classes, [n]
	images     []float32 // clean, then attacked, [2n, pixels]
	answers    []uint8   // the signed model's, [2n]
	attack     string
	confidence float64
	clean      float64 // least accuracy by the signed report, lower bounds
	robust     float64
}

// prepare attacks the candidate here, before it is in service.
func (w *Watch) prepare(ctx context.Context, s *step.Step, candidate *verify.Model, report *evaluate.Report, model *zoo.Model) (*examples, error) {
	for _, e := range w.Endpoints {
		if u, err := url.Parse(e); err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
			return nil, step.BadInput(fmt.Errorf("--endpoint %q: must be an http or https URL, such as http://serve:8080", e))
		}
	}
	if w.Dataset == "" {
		w.Dataset = model.Dataset
	}
	if w.Attack == "" {
		w.Attack = model.Policy.Attacks[0]
	}
	a, err := attack.Parse(w.Attack, model.Policy.Threat)
	if err != nil {
		return nil, step.BadInput(fmt.Errorf("--endpoint-attack: %w", err))
	}
	e := &examples{shape: candidate.Network.Input, attack: a.Name(), confidence: model.Policy.Confidence, clean: report.CleanAccuracyLowerBound}
	i := slices.IndexFunc(report.Attacks, func(r evaluate.Attack) bool { return r.Name == a.Name() && r.MadeOn == "" })
	if i < 0 {
		return nil, step.BadInput(fmt.Errorf("--endpoint-attack %s: the signed report has no figure for it", a.Name()))
	}
	e.robust = report.Attacks[i].AccuracyLowerBound
	splits, err := artifact.OpenDataset(ctx, w.Dataset)
	if err != nil {
		return nil, err
	}
	if got := splits.Test.Digest(); got != report.DatasetDigest {
		return nil, step.BadInput(fmt.Errorf("--endpoint-dataset %s: its test images are %s, and the signed report is about %s", w.Dataset, got, report.DatasetDigest))
	}
	target, err := graph.NewAttack(candidate.Network, batch)
	if err != nil {
		return nil, err
	}
	if err := evaluate.Fits(target, splits.Test); err != nil {
		return nil, step.BadInput(err)
	}
	n := min(w.Samples, splits.Test.Len())
	test := splits.Test.Slice(0, n)
	size := test.Shape.Size()
	e.labels, e.images = test.Labels, make([]float32, 2*n*size)
	test.Read(e.images[:n*size], 0, n)
	s.Log.Info("attacking the candidate", "attack", a.Name(), "samples", n)
	hostile, err := a.Perturb(ctx, target, e.images[:n*size], test.Labels, 1)
	if err != nil {
		return nil, err
	}
	copy(e.images[n*size:], hostile)
	forward, err := nn.NewForward(candidate.Network, batch)
	if err != nil {
		return nil, err
	}
	classes := candidate.Network.Classes()
	for lo := 0; lo < 2*n; lo += batch {
		rows := min(batch, 2*n-lo)
		logits := forward.Logits(e.images[lo*size:(lo+rows)*size], rows)
		for r := range rows {
			e.answers = append(e.answers, largest(logits[r*classes:][:classes]))
		}
	}
	return e, nil
}

// largest is the first class with the largest logit, as serve answers.
func largest(logits []float32) uint8 {
	best := 0
	for j, v := range logits {
		if v > logits[best] {
			best = j
		}
	}
	return uint8(best)
}

// look waits until every endpoint serves the head, and compares the answers
// with the signed figures. The error says what is worse.
func (w *Watch) look(ctx context.Context, s *step.Step, head *channel.Head, e *examples) (*Live, error) {
	for _, endpoint := range w.Endpoints {
		if w.unnamed {
			continue
		}
		if err := w.await(ctx, endpoint, head.Model); err != nil {
			return nil, err
		}
		s.Log.Info("rolled out", "endpoint", endpoint, "digest", head.Model)
	}
	n, size := len(e.labels), e.shape.Size()
	live := &Live{Attack: e.attack}
	var clean, robust int
	for _, endpoint := range w.Endpoints {
		client := &inference.Client{URL: endpoint, Model: w.Name, Binary: !w.unnamed, HTTP: fresh}
		for lo := 0; lo < 2*n; lo += batch {
			rows := min(batch, 2*n-lo)
			answer, err := patient(ctx, func() (*inference.Answer, error) {
				return client.Predict(ctx, e.images[lo*size:(lo+rows)*size], rows, e.shape)
			})
			if err != nil {
				return live, fmt.Errorf("%s: %w", endpoint, err)
			}
			for r, got := range answer.Labels {
				i := lo + r
				if got != int64(e.answers[i]) {
					live.Different++
				}
				switch right := got == int64(e.labels[i%n]); {
				case right && i < n:
					clean++
				case right:
					robust++
				}
			}
		}
		live.Samples += n
	}
	live.CleanAccuracy, live.RobustAccuracy = float64(clean)/float64(live.Samples), float64(robust)/float64(live.Samples)
	s.Log.Info("live figures", "clean_accuracy", live.CleanAccuracy, "robust_accuracy", live.RobustAccuracy, "attack", live.Attack, "samples", live.Samples, "different", live.Different)
	switch {
	case interval.Upper(clean, live.Samples, e.confidence) < e.clean:
		return live, fmt.Errorf("live clean accuracy is %.4f, and the signed report says at least %.4f", live.CleanAccuracy, e.clean)
	case interval.Upper(robust, live.Samples, e.confidence) < e.robust:
		return live, fmt.Errorf("live accuracy under %s is %.4f, and the signed report says at least %.4f", e.attack, live.RobustAccuracy, e.robust)
	case float64(live.Different) > maxDifferent*float64(2*live.Samples):
		return live, fmt.Errorf("%d of %d live answers are not those of the signed model", live.Different, 2*live.Samples)
	}
	return live, nil
}

// patient tries again while the endpoint is overloaded.
func patient(ctx context.Context, ask func() (*inference.Answer, error)) (*inference.Answer, error) {
	for tries := 0; ; tries++ {
		answer, err := ask()
		var busy *inference.StatusError
		if !errors.As(err, &busy) || busy.Code != http.StatusTooManyRequests || tries == 10 {
			return answer, err
		}
		if err := sleep(ctx, time.Second); err != nil {
			return nil, err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// await asks an endpoint which digest it serves until it is the one wanted.
func (w *Watch) await(ctx context.Context, endpoint, digest string) error {
	ctx, cancel := context.WithTimeout(ctx, w.Timeout)
	defer cancel()
	problem := error(nil)
	for seen := 0; seen < inARow; {
		switch served, err := served(ctx, endpoint, w.Name); {
		case err != nil && ctx.Err() == nil:
			seen, problem = 0, err
		case err == nil && served != digest:
			seen, problem = 0, fmt.Errorf("it serves %s", served)
		case err == nil:
			seen++
			continue
		}
		if sleep(ctx, pollEvery) != nil {
			return fmt.Errorf("%s did not serve %s within %v: %w", endpoint, digest, w.Timeout, problem)
		}
	}
	return nil
}

// served is the digest that an endpoint says it serves.
func served(ctx context.Context, endpoint, name string) (string, error) {
	target := strings.TrimSuffix(endpoint, "/") + "/v2/models/" + url.PathEscape(name)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return "", err
	}
	resp, err := fresh.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxMetadata))
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("GET %s: %s", target, resp.Status)
	}
	var about struct {
		Parameters struct{ Digest string }
	}
	if err := json.Unmarshal(data, &about); err != nil {
		return "", fmt.Errorf("GET %s: %w", target, err)
	}
	return about.Parameters.Digest, nil
}

// back puts the model before into service again, by a signed record that says
// why, and waits for the servers.
func (j *Job) back(ctx context.Context, s *step.Step, cluster *connection, p channel.Promotion, before, bad *channel.Head, because error) (*channel.Head, *promoted, error) {
	if before == nil {
		return nil, nil, fmt.Errorf("the model in service is not what its report says, and there is none to go back to: %w", because)
	}
	// It was good enough for its day: its signature is asked for, and that it
	// is not revoked.
	p.Policy.Robustness = nil
	p.Model, p.InService, p.Rollback, p.Report = before.Reference, &bad.Model, true, before.Report
	p.Reason = fmt.Sprintf("automatic, from %s: %v", bad.Model, because)
	p.Reason = p.Reason[:min(len(p.Reason), maxReason)]
	head, err := channel.Promote(ctx, p)
	var turned *store.Refused
	if errors.As(err, &turned) {
		err = step.Refused(err)
	}
	if err != nil {
		return nil, nil, refused(fmt.Errorf("rolling back because %w: %w", because, err))
	}
	s.Log.Warn("rolled back", "channel", j.Channel, "sequence", head.Sequence, "model", head.Reference)
	target := &promoted{channel: j.Channel, sequence: head.Sequence, model: head.Reference}
	target.modelcar, err = cluster.modelcar(ctx, &verify.Verified{Reference: head.Reference, Digest: head.Model}, p.Policy)
	if err == nil {
		err = cluster.roll(ctx, s, target)
	}
	for _, endpoint := range j.Watch.Endpoints {
		if err == nil && !j.Watch.unnamed {
			err = j.Watch.await(ctx, endpoint, head.Model)
		}
	}
	if err != nil {
		s.Log.Error("the channel went back, and not all servers did", "error", err.Error())
	}
	return head, target, nil
}

// maxReason is a few sentences of a record.
const maxReason = 500
