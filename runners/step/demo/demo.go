// Package demo plays one incident from end to end on one machine: a model is
// trained, signed and served; attacked over HTTP; seen to be under attack;
// hardened, gated, signed and promoted while it is in use; and attacked again.
// It makes the calls that a shell user or a workflow would make, in order, and
// measures what comes of them.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/gate"
	"github.com/temper-ml/temper/models/nn/graph"
	"github.com/temper-ml/temper/models/nn/kernel"
	"github.com/temper-ml/temper/models/report"
	"github.com/temper-ml/temper/models/unknown"
	"github.com/temper-ml/temper/models/zoo"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
	"github.com/temper-ml/temper/runners/step/evaluate"
	"github.com/temper-ml/temper/runners/step/keygen"
	"github.com/temper-ml/temper/runners/step/pack"
	"github.com/temper-ml/temper/runners/step/promote"
	"github.com/temper-ml/temper/runners/step/retrain"
	"github.com/temper-ml/temper/runners/step/sentinel"
	"github.com/temper-ml/temper/runners/step/serve"
	"github.com/temper-ml/temper/runners/step/sign"
	"github.com/temper-ml/temper/runners/step/train"
	"github.com/temper-ml/temper/signing/channel"
	"github.com/temper-ml/temper/signing/store"
	"github.com/temper-ml/temper/signing/verify"
)

// preset is what differs between the demo's scenarios.
type preset struct {
	model string // of the zoo: network, recipes, threat model and policy
	about string
}

var presets = map[string]preset{
	"default": {"wong", "a small network, epsilon 0.3, hardened by PGD-3"},
	"paper":   {"paper", "arXiv 2605.15249: its network, epsilon 0.15, hardened by PGD"},
}

const (
	// guardNetwork and guardEpochs: the detector's guard is a small network of
	// its own, and needs to be robust, not accurate. With a guard of 3, 2 and 1
	// epochs the detector flagged 85%, 90% and 89% of the calibration's attacks.
	guardNetwork = "wong"
	guardRecipe  = "fast"
	guardEpochs  = 2
	// pause between a user's requests while the defence trains: the machine's
	// cores are for the training then.
	pause = 50 * time.Millisecond
	// labelEvery is how many requests there are to each whose true class is told
	// to the sentinel, by so many people in turn that none sends more than it
	// takes of one.
	labelEvery = 100
	labellers  = 16
	// undefendedAccuracy is what the first model must have.
	undefendedAccuracy = 0.9
	// afterReload is how long the load goes on at full speed once the new model
	// answers.
	afterReload = time.Second
	// sentinelTimeout is how long a burst may take to reach the sentinel, and
	// an alarm to reach the demo.
	sentinelTimeout = 30 * time.Second
)

// Result is the demo's answer. Accuracies are fractions from 0 to 1, measured
// over HTTP on the live service.
type Result struct {
	Preset  string  `json:"preset"`
	Network string  `json:"network"`
	Epsilon float64 `json:"epsilon"`
	Seed    uint64  `json:"seed"`

	CleanAccuracy          float64 `json:"clean_accuracy"`           // of the model before the attack
	AttackedAccuracy       float64 `json:"attacked_accuracy"`        // of that model under FGSM made from its weights
	RecoveredAccuracy      float64 `json:"recovered_accuracy"`       // of the promoted model under FGSM made from its weights
	RecoveredCleanAccuracy float64 `json:"recovered_clean_accuracy"` // of the promoted model
	TransferAccuracy       float64 `json:"transfer_accuracy"`        // of the promoted model under the first attack's images
	LabelledAccuracy       float64 `json:"labelled_accuracy"`        // of the promoted model in the end, as the sentinel sees it by the labels of few requests
	PGDAccuracy            float64 `json:"pgd_accuracy"`             // worst case of the gate's attacks on the promoted model, by its report
	PGDAccuracyLowerBound  float64 `json:"pgd_accuracy_lower_bound"`

	DetectionDelayRequests int `json:"detection_delay_requests"` // hostile requests up to the alarm
	FalseAlarms            int `json:"false_alarms"`             // on the clean requests before the attack
	CleanRequests          int `json:"clean_requests"`
	DroppedRequests        int `json:"dropped_requests"` // through the defence and the reload
	Requests               int `json:"requests"`

	Verdict        string `json:"verdict"`         // of the gate on the hardened model: pass, or fail and nothing is promoted
	ModelDigest    string `json:"model_digest"`    // of the first model's artifact
	PromotedDigest string `json:"promoted_digest"` // of the hardened model's artifact; "" where the gate rejected it
	Sequence       int    `json:"sequence"`        // of the promotion in its channel

	SecondsToRecover float64            `json:"seconds_to_recover"` // from the first hostile request to the promoted model in service; 0 where none was promoted
	SecondsTotal     float64            `json:"seconds_total"`
	Seconds          map[string]float64 `json:"seconds"` // by phase
	PeakRSSBytes     int64              `json:"peak_rss_bytes"`

	Report string `json:"report"` // path of the HTML page
	Folder string `json:"folder"`
}

// Command is the demo.
func Command() *cobra.Command {
	d := &demo{}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Train, serve, attack, detect, harden, promote and attack again, on this machine",
		Long: `Play one incident from end to end in this process, on the embedded MNIST, with a
registry on loopback and without any other network. Keeps the registry, keys,
checkpoints and an HTML report in a folder.

Presets:
` + describePresets(),
		Example: `  temper demo
  temper demo --preset paper --epochs 3
  temper demo -o json | jq .recovered_accuracy`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return d.run(cmd) },
	}
	flags := cmd.Flags()
	flags.StringVar(&d.preset, "preset", "default", strings.Join(presetNames(), " or "))
	flags.StringVar(&d.model, "model", "", "model of the zoo, or the path of a YAML file, in place of the preset's")
	step.Float(flags, &d.epochs, "epochs", 0, 0, train.MaxEpochs, "epochs of each training; 0 keeps the recipes' own (fewer make a constant learning rate rise and fall)")
	flags.Uint64Var(&d.seed, "seed", 1, "seed of everything random")
	flags.StringVar(&d.folder, "dir", "temper-demo", "folder for what the demo makes; that of an earlier demo is replaced")
	step.Int(flags, &d.samples, "samples", 10_000, 2_000, 10_000, "test images that are sent, clean and attacked")
	return cmd
}

func presetNames() []string {
	var names []string
	for name := range presets {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func describePresets() string {
	var b strings.Builder
	for _, name := range presetNames() {
		fmt.Fprintf(&b, "  %-8s %s\n", name, presets[name].about)
	}
	return b.String()
}

// demo is one run.
type demo struct {
	preset, folder string
	model          string // of the zoo, or a path
	epochs         float64
	seed           uint64
	samples        int

	*narrator
	mark   *os.File
	ctx    context.Context
	step   *step.Step
	zoo    *zoo.Model
	splits *dataset.Splits
	base   string // HOST:PORT/mnist
	key    string
	// undefended is the path of a policy that asks for accuracy only: what
	// most teams go by until the first attack.
	undefended string
	policy     verify.Policy
	clients    *clients
	result     Result
	live       []report.Live
	labels     int // told to the sentinel
	answers    answers
}

// answers are the labels that the service gave to the test images, for the
// report.
type answers struct {
	before, beforeHostile  []int64
	after, afterSameImages []int64
	afterHostile           []int64
}

func (d *demo) run(cmd *cobra.Command) (err error) {
	p, ok := presets[d.preset]
	if !ok {
		return step.BadInput(unknown.Name("preset", d.preset, presetNames()))
	}
	if d.model == "" {
		d.model = p.model
	}
	if d.zoo, err = zoo.Load(d.model); err != nil {
		return step.BadInput(err)
	}
	ctx, cancel := context.WithCancel(cmd.Context())
	defer cancel()
	d.ctx, d.step = ctx, step.From(cmd)
	d.narrator = newNarrator(cmd.ErrOrStderr(), d.step.Progress, d.step.Quiet)
	err = d.prepare()
	defer d.mark.Close() // and with it the lock
	if err != nil {
		return err
	}
	d.result = Result{
		Preset: d.preset, Network: d.zoo.Network.Name, Epsilon: d.zoo.Threat.Epsilon, Seed: d.seed,
		Folder: d.folder, Report: filepath.Join(d.folder, "report.html"),
	}

	registry, err := store.Start(ctx, filepath.Join(d.folder, "registry"), "")
	if err != nil {
		return err
	}
	defer registry.Close()
	d.base = registry.Addr() + "/" + d.zoo.Name
	d.say("registry on %s, kept in %s", registry.Addr(), filepath.Join(d.folder, "registry"))

	first, err := d.firstModel()
	if err != nil {
		return err
	}
	guard, err := d.trainGuard()
	if err != nil {
		return err
	}
	if err := d.detector(first, guard); err != nil {
		return err
	}
	if err := d.promote(first, d.undefended); err != nil {
		return err
	}
	d.result.ModelDigest = digestOf(first.packed)

	live, err := d.startServing(ctx)
	if err != nil {
		return err
	}
	defer live.close()
	test := d.splits.Test.Slice(0, min(d.samples, d.splits.Test.Len()))
	second, hostile, err := d.incident(live, first, test)
	if err != nil {
		return err
	}
	d.result.Seconds, d.result.SecondsTotal = d.seconds()
	d.result.PeakRSSBytes = peakRSS()
	if err := d.writePage(first, second, test, hostile); err != nil {
		return err
	}
	for _, name := range checkpoints { // else the next demo would have nothing to train
		if err := os.Remove(filepath.Join(d.folder, name)); err != nil {
			return err
		}
	}
	return d.step.Print(d.table(), d.result)
}

// mark is the file that makes a folder a demo's. It says which demo, and is
// locked while one runs.
const mark = ".temper-demo"

// checkpoints are those of the demo's trainings.
var checkpoints = []string{"standard.checkpoint", "guard.checkpoint", "hardened.checkpoint"}

// made is what a demo leaves in its folder, besides checkpoints.
var made = []string{"registry", "keys", "report.html", "undefended.yaml", "retrain.yaml", stateFile}

// stateFile is the sentinel's.
const stateFile = "sentinel.db"

// prepare makes the folder. It removes what an earlier demo made, and nothing
// else; checkpoints stay where the same demo was interrupted.
func (d *demo) prepare() error {
	entries, err := os.ReadDir(d.folder)
	if err == nil && len(entries) > 0 {
		if _, err := os.Stat(filepath.Join(d.folder, mark)); err != nil {
			return step.BadInput(fmt.Errorf("--dir %s: holds something else than a demo: name a new or empty folder", d.folder))
		}
	}
	if err := os.MkdirAll(d.folder, 0o755); err != nil {
		return step.BadInput(fmt.Errorf("--dir: %w", err))
	}
	if d.mark, err = os.OpenFile(filepath.Join(d.folder, mark), os.O_RDWR|os.O_CREATE, 0o644); err != nil {
		return step.BadInput(fmt.Errorf("--dir: %w", err))
	}
	if err := lock(d.mark); err != nil {
		return step.BadInput(fmt.Errorf("--dir %s: another demo is running there: name another folder", d.folder))
	}
	remove := made
	this := fmt.Sprintf("%s %v %d %v %s\n", d.model, d.epochs, d.seed, d.zoo.Threat, kernel.Path())
	before, err := io.ReadAll(io.LimitReader(d.mark, int64(len(this)+1)))
	if err != nil {
		return err
	}
	if string(before) != this {
		remove = append(remove, checkpoints...)
	}
	for _, name := range remove {
		if err := os.RemoveAll(filepath.Join(d.folder, name)); err != nil {
			return err
		}
	}
	if err := d.mark.Truncate(0); err != nil {
		return err
	}
	if _, err := d.mark.WriteAt([]byte(this), 0); err != nil {
		return err
	}
	if d.splits, err = artifact.OpenDataset(d.ctx, d.zoo.Dataset); err != nil {
		return err
	}
	// The key lives as long as the demo's folder and protects nothing else.
	if _, set := os.LookupEnv("COSIGN_PASSWORD"); !set {
		os.Setenv("COSIGN_PASSWORD", "")
	}
	var keys struct {
		PrivateKey string `json:"private_key"`
		PublicKey  string `json:"public_key"`
	}
	if err := d.call(keygen.Command(), &keys, "--dir", filepath.Join(d.folder, "keys")); err != nil {
		return err
	}
	d.key = keys.PrivateKey
	pem, err := os.ReadFile(keys.PublicKey)
	if err != nil {
		return err
	}
	if err := d.writeUndefended(); err != nil {
		return err
	}
	d.policy = verify.Policy{Keys: []verify.Key{{Name: "demo", PEM: pem}}, Robustness: &verify.Requirement{
		Dataset: d.splits.Test.Digest(), Norm: d.zoo.Threat.Norm, Epsilon: d.zoo.Threat.Epsilon,
	}}
	return nil
}

func (d *demo) writeUndefended() error {
	policy := d.zoo.Policy
	policy.Threat = attack.Threat{} // the model's, below
	policy.MinCleanAccuracy = min(policy.MinCleanAccuracy, undefendedAccuracy)
	policy.MinRobustAccuracy = 0
	data, err := yaml.Marshal(map[string]any{
		"name": d.zoo.Name, "network": d.zoo.Network, "dataset": d.zoo.Dataset, "threat": d.zoo.Threat, "policy": policy,
		"recipe": map[string]any{"train": d.zoo.Train, "retrain": d.zoo.Retrain},
	})
	if err != nil {
		return err
	}
	d.undefended = filepath.Join(d.folder, "undefended.yaml")
	return step.WriteFile(d.undefended, data, 0o644)
}

// call runs a step and reads its answer.
func (d *demo) call(cmd *cobra.Command, answer any, args ...string) error {
	return d.step.Call(d.ctx, cmd, answer, d.part, args...)
}

// model is a model on its way: its artifacts, each with its digest.
type model struct {
	network  string // model.onnx and how it was trained
	report   evaluate.Result
	packed   string // ModelPack
	modelcar string
}

func digestOf(ref string) string {
	_, digest, _ := strings.Cut(ref, "@")
	return digest
}

func (d *demo) trainingFlags(output string, epochs float64) []string {
	return []string{
		"--seed", fmt.Sprint(d.seed), "--epochs", fmt.Sprint(epochs), "--epsilon", fmt.Sprint(d.zoo.Threat.Epsilon),
		"--checkpoint", filepath.Join(d.folder, output+".checkpoint"), "--output", d.base + ":" + output,
	}
}

// firstModel is what most teams have: accurate, and never attacked. It goes
// into service by a policy that asks for accuracy only.
func (d *demo) firstModel() (*model, error) {
	var trained train.Result
	m := &model{}
	err := d.phase("train", "training %s on %d images", func() error {
		return d.call(train.Command(), &trained, append([]string{"--network", d.model}, d.trainingFlags("standard", d.epochs)...)...)
	}, d.zoo.Network.Name, d.splits.Train.Len())
	if err != nil {
		return nil, err
	}
	m.network = trained.Reference
	err = d.phase("evaluate", "measuring it", func() error {
		return d.evaluate(m, "standard-report", d.undefended)
	})
	if err != nil {
		return nil, err
	}
	return m, d.phase("sign", "packing and signing it", func() error {
		return d.packAndSign(m, "1", d.undefended)
	})
}

func (d *demo) evaluate(m *model, output, policy string, more ...string) error {
	args := []string{"--model", m.network, "--policy", policy, "--samples", fmt.Sprint(d.samples), "--seed", fmt.Sprint(d.seed), "--output", d.base + ":" + output}
	return d.call(evaluate.Command(), &m.report, append(args, more...)...)
}

func (d *demo) packAndSign(m *model, version, policy string) error {
	var packed pack.Result
	if err := d.call(pack.Command(), &packed, "--model", m.network, "--report", m.report.Reference, "--version", version, "--output", d.base+":"+version); err != nil {
		return err
	}
	m.packed, m.modelcar = packed.Reference, packed.ModelcarReference
	var signed sign.Result
	err := d.call(sign.Command(), &signed, "--key", d.key, "--policy", policy, m.packed, m.modelcar)
	if err == nil && signed.Verdict != "signed" {
		return rejected(signed.Reasons)
	}
	return err
}

// trainGuard trains the small robust network beside the model that the
// detector asks for a second opinion.
func (d *demo) trainGuard() (ref string, err error) {
	epochs := float64(guardEpochs)
	if d.epochs > 0 {
		epochs = min(epochs, d.epochs)
	}
	var trained train.Result
	err = d.phase("guard", "training a small robust guard for the detector", func() error {
		return d.call(train.Command(), &trained, append([]string{"--network", guardNetwork, "--recipe", guardRecipe, "--dataset", d.zoo.Dataset}, d.trainingFlags("guard", epochs)...)...)
	})
	return trained.Reference, err
}

// detector calibrates and signs the detector of a model.
func (d *demo) detector(m *model, guard string) error {
	return d.phase("calibrate", "calibrating its detector", func() error {
		c := sentinel.Command()
		var made struct {
			Reference string `json:"reference"`
		}
		if err := d.call(c, &made, "calibrate", "--model", m.packed, "--guard", guard, "--dataset", d.zoo.Dataset); err != nil {
			return err
		}
		var signed sign.Result
		return d.call(sign.Command(), &signed, "--key", d.key, made.Reference)
	})
}

func (d *demo) promote(m *model, policy string) error {
	return d.phase("promote", "promoting it", func() error {
		var promoted promote.Result
		err := d.call(promote.Command(), &promoted, "--channel", d.channel(), "--model", m.packed, "--key", d.key, "--policy", policy)
		if err == nil && promoted.Verdict != promote.Promoted {
			return rejected(promoted.Reasons)
		}
		return err
	})
}

// rejected says why the gate turned a model down.
type rejected []gate.Reason

func (reasons rejected) Error() string {
	var why []string
	for _, r := range reasons {
		if !r.Pass {
			why = append(why, r.String())
		}
	}
	return "the gate rejected the model, and the service stays as it is: " + strings.Join(why, "; ")
}

func (d *demo) channel() string { return d.base + ":production" }

// service is the server and the sentinel beside it.
type service struct {
	server   *serve.Server
	sentinel *sentinel.Sentinel
	source   sentinel.Source
	url      string
	opened   chan sentinel.Incident
	cancel   context.CancelFunc
	ended    []chan error
}

func (s *service) close() {
	s.cancel()
	for _, e := range s.ended {
		<-e
	}
	s.sentinel.Close()
}

// startServing brings up the server and the sentinel, each behind a port of
// its own as in pods.
func (d *demo) startServing(ctx context.Context) (*service, error) {
	ctx, cancel := context.WithCancel(ctx)
	s := &service{cancel: cancel, opened: make(chan sentinel.Incident, 16)}
	return s, d.phase("serve", "verifying the signature and serving the model", func() (err error) {
		defer func() {
			if err != nil {
				cancel()
			}
		}()
		s.source = &sentinel.Registry{Reference: d.channel(), Served: &serve.Channel{Reference: d.channel(), Policy: d.policy}, Policy: d.policy}
		s.sentinel, err = sentinel.New(sentinel.Config{
			Defence: started{s.opened},
			Keep:    sentinel.Keeper(d.base),
			State:   filepath.Join(d.folder, stateFile),
			Log:     d.quiet(),
		})
		if err != nil {
			return err
		}
		if err := s.sentinel.Load(ctx, s.source); err != nil {
			return err
		}
		watch, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		s.run(func() error { return s.sentinel.Serve(ctx, watch) })
		d.say("the sentinel's page: http://%s/", watch.Addr())
		s.server, err = serve.New(serve.Options{
			Name: d.zoo.Name, Source: &serve.Channel{Reference: d.channel(), Policy: d.policy},
			Mirror: "http://" + watch.Addr().String(), Log: d.quiet(),
		})
		if err != nil {
			return err
		}
		public, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		s.url = "http://" + public.Addr().String()
		s.run(func() error { return s.server.Serve(ctx, public, nil) })
		d.clients = newClients(s.url, d.zoo.Name, d.splits.Test.Shape)
		for !s.server.Ready() {
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case err := <-s.ended[len(s.ended)-1]:
				return fmt.Errorf("the server ended before it was ready: %w", err)
			case <-time.After(5 * time.Millisecond):
			}
		}
		d.event(report.Neutral, "in service", "model %s is verified and answers at %s", short(s.server.Digest()), s.url)
		return nil
	})
}

func (s *service) run(f func() error) {
	done := make(chan error, 1)
	s.ended = append(s.ended, done)
	go func() {
		done <- f()
		close(done)
	}()
}

// started hands each incident to the demo, which is the defence.
type started struct{ incidents chan<- sentinel.Incident }

func (s started) Start(ctx context.Context, i sentinel.Incident) error {
	select {
	case s.incidents <- i:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func short(digest string) string {
	return digest[:min(len(digest), len("sha256:")+12)]
}

// errNotSeen is the failure that the demo exists to rule out.
var errNotSeen = errors.New("the attack was not detected")

// incident is the story itself. It returns the promoted model and the images
// of the first attack.
func (d *demo) incident(live *service, first *model, test *dataset.Set) (second *model, hostile []float32, err error) {
	clean := make([]float32, test.Len()*test.Shape.Size())
	test.Read(clean, 0, test.Len())

	var traffic *traffic
	err = d.phase("clean", "%d clean requests", func() (err error) {
		traffic, err = d.send(live, clean, test.Labels)
		return err
	}, test.Len())
	if err != nil {
		return nil, nil, err
	}
	d.answers.before = d.count(traffic, test)
	before := live.sentinel.Status()
	d.result.CleanRequests = traffic.sent
	d.result.CleanAccuracy = traffic.accuracy(test.Labels)
	d.result.FalseAlarms = len(before.Incidents)
	if before.Open != nil {
		d.result.FalseAlarms++
	}
	d.event(report.Neutral, "clean traffic", "%d requests, %s right, %d false alarms", traffic.sent, report.Percent(d.result.CleanAccuracy), d.result.FalseAlarms)
	if d.result.FalseAlarms > 0 {
		return nil, nil, fmt.Errorf("%d false alarms on clean traffic: nothing that follows would mean anything", d.result.FalseAlarms)
	}

	hostile, err = d.attacker("attack", clean, test)
	if err != nil {
		return nil, nil, err
	}
	attacked := time.Now()
	if d.result.AttackedAccuracy, d.answers.beforeHostile, err = d.strike(live, hostile, test); err != nil {
		return nil, nil, err
	}

	var alarm sentinel.Incident
	select {
	case alarm = <-live.opened:
	case <-time.After(sentinelTimeout):
		return nil, nil, errNotSeen
	}
	d.result.DetectionDelayRequests = int(alarm.Request) - int(before.Requests)
	d.event(report.Good, "alarm", "at hostile request %d, with %.0f%% of the traffic hostile and epsilon about %v by the sentinel's estimate; the defence begins", d.result.DetectionDelayRequests, 100*alarm.Share, alarm.Epsilon)

	// Users and attacker go on through everything that follows.
	part := len(clean) / 10 / test.Shape.Size() * test.Shape.Size()
	labels := test.Labels[:part/test.Shape.Size()]
	load := d.clients.start(d.ctx, slices.Concat(clean[:part], hostile[:part]), slices.Concat(labels, labels), pause, &d.requests)
	begun := int(d.requests.Load())
	second, err = d.defend(first, alarm)
	turnedDown := new(rejected)
	switch {
	case errors.As(err, turnedDown):
		err = nil
		d.event(report.Bad, "rejected", "%v", *turnedDown)
	case err == nil:
		load.pause.Store(0)
		err = d.phase("reload", "reloading under load", func() error { return d.reload(live, second) })
	}
	load.end()
	if err != nil {
		return nil, nil, err
	}
	d.liveAccuracy(begun, load.right)
	if d.result.DroppedRequests = load.dropped; load.err != nil {
		d.step.Log.Warn("a request was dropped", "error", load.err)
	}
	if d.result.Verdict == "pass" {
		d.result.PromotedDigest = digestOf(second.packed)
		d.result.SecondsToRecover = time.Since(attacked).Seconds()
		d.event(report.Good, "promoted", "record %d: model %s answers; %d requests dropped", d.result.Sequence, short(d.result.PromotedDigest), d.result.DroppedRequests)
	}
	return second, hostile, d.again(live, second, clean, hostile, test)
}

// send sends images, no faster than the sentinel sees them. People tell the
// sentinel the true classes of a few.
func (d *demo) send(live *service, pixels []float32, classes []uint8) (*traffic, error) {
	// What is left of other traffic would take the room of this in the mirror.
	if err := d.until(live.server.Mirrored, "the server's mirror is stuck"); err != nil {
		return nil, err
	}
	return d.clients.send(d.ctx, pixels, func(t *traffic, lo, hi int) error {
		d.part(hi, t.sent)
		seen := lo
		if err := d.until(func() bool {
			for seen < hi && live.sentinel.Scored(t.ids[seen]) {
				seen++
			}
			return seen == hi
		}, "the sentinel has not seen all requests"); err != nil {
			return err
		}
		for i := lo; i < hi; i += labelEvery {
			d.labels++
			label := sentinel.Feedback{ID: t.ids[i], Label: int(classes[i]), Source: fmt.Sprintf("person %d", d.labels%labellers)}
			if err := live.sentinel.Feedback(label); err != nil {
				return err
			}
		}
		return nil
	})
}

// until waits for a condition, for sentinelTimeout at most.
func (d *demo) until(done func() bool, otherwise string) error {
	for deadline := time.Now().Add(sentinelTimeout); !done(); {
		if time.Now().After(deadline) {
			return errors.New(otherwise)
		}
		select {
		case <-d.ctx.Done():
			return d.ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
	return nil
}

// attacker reads the model in service from the registry, as an insider would,
// and makes an adversarial image of each clean one from its weights.
func (d *demo) attacker(phase string, clean []float32, test *dataset.Set) (hostile []float32, err error) {
	return hostile, d.phase(phase, "an attacker reads the weights and makes %d images by FGSM, epsilon %v", func() error {
		head, err := channel.Read(d.ctx, d.channel(), d.policy)
		if err != nil {
			return err
		}
		stolen, err := artifact.ReadModel(d.ctx, head.Reference)
		if err != nil {
			return err
		}
		weights, err := graph.NewAttack(stolen.Network, 256)
		if err != nil {
			return err
		}
		hostile, err = attack.FGSM(d.zoo.Threat).Perturb(d.ctx, weights, clean, test.Labels, d.seed)
		return err
	}, test.Len(), d.zoo.Threat.Epsilon)
}

// strike sends hostile images and returns the answers and their accuracy.
func (d *demo) strike(live *service, hostile []float32, test *dataset.Set) (float64, []int64, error) {
	var t *traffic
	err := d.phase("strike", "%d hostile requests", func() (err error) {
		d.event(report.Bad, "attack", "FGSM, epsilon %v, made from the weights of %s", d.zoo.Threat.Epsilon, short(live.server.Digest()))
		t, err = d.send(live, hostile, test.Labels)
		return err
	}, test.Len())
	if err != nil {
		return 0, nil, err
	}
	labels := d.count(t, test)
	accuracy := t.accuracy(test.Labels)
	tone := report.Bad
	if accuracy > 0.9*d.result.CleanAccuracy {
		tone = report.Good
	}
	d.event(tone, "under attack", "%s of the answers are right", report.Percent(accuracy))
	return accuracy, labels, nil
}

// count adds requests that are done to the totals, and their accuracy to the
// report's chart.
func (d *demo) count(t *traffic, test *dataset.Set) []int64 {
	right := make([]bool, t.sent)
	for i, l := range t.labels {
		right[i] = l == int64(test.Labels[i])
	}
	d.liveAccuracy(int(d.requests.Load()), right)
	d.requests.Add(int64(t.sent))
	return t.labels
}

// liveAccuracy adds the accuracy of a stretch of answers to the report's chart,
// in ten points.
func (d *demo) liveAccuracy(begun int, right []bool) {
	const points = 10
	for p := range points {
		lo, hi := len(right)*p/points, len(right)*(p+1)/points
		if lo == hi {
			continue
		}
		n := 0
		for _, ok := range right[lo:hi] {
			if ok {
				n++
			}
		}
		d.live = append(d.live, report.Live{Request: begun + hi, Accuracy: float64(n) / float64(hi-lo)})
	}
}

// defend is what the sentinel starts: from the attacked model to a promoted
// one, or to a rejection that leaves the service as it is.
func (d *demo) defend(first *model, alarm sentinel.Incident) (*model, error) {
	var trained train.Result
	second := &model{}
	err := d.phase("retrain", "hardening the model", func() error {
		recipe, err := d.retrainRecipe()
		if err != nil {
			return err
		}
		return d.call(retrain.Command(), &trained, append([]string{"--model", first.packed, "--recipe", recipe, "--dataset", d.zoo.Dataset}, d.trainingFlags("hardened", d.epochs)...)...)
	})
	if err != nil {
		return nil, err
	}
	second.network = trained.Reference
	d.event(report.Neutral, "hardened", "%d optimiser steps", trained.Steps)
	alarm.Note("hardened", fmt.Sprintf("%d optimiser steps", trained.Steps))
	err = d.phase("gate", "attacking it before anybody else does", func() error {
		return d.evaluate(second, "hardened-report", d.model, "--against", first.report.Reference)
	})
	if err != nil {
		return nil, err
	}
	d.result.Verdict = second.report.Verdict
	d.result.PGDAccuracy, d.result.PGDAccuracyLowerBound = second.report.RobustAccuracy, second.report.RobustAccuracyLowerBound
	if second.report.Verdict != "pass" {
		alarm.Note("rejected", "by the gate")
		return second, rejected(second.report.Reasons)
	}
	alarm.Note("gate passed", fmt.Sprintf("%s right in the worst case", report.Percent(second.report.RobustAccuracy)))
	d.event(report.Good, "gate passed", "%s right in the worst case of %s", report.Percent(second.report.RobustAccuracy), strings.Join(d.zoo.Policy.Attacks, " and "))
	if err := d.phase("sign", "packing and signing it", func() error { return d.packAndSign(second, "2", d.model) }); err != nil {
		return nil, err
	}
	guard := d.base + ":guard"
	if err := d.detector(second, guard); err != nil {
		return nil, err
	}
	if err := d.promote(second, d.model); err != nil {
		return nil, err
	}
	alarm.Note("promoted", short(digestOf(second.packed)))
	return second, nil
}

// retrainRecipe writes the zoo model's retraining recipe where the step can
// read it. With fewer epochs a constant learning rate becomes one that rises
// and falls, with half again the area, its mean at most the rate of the first
// training: at 1e-4 the paper's defence needs all of its 20 epochs (docs/training.md).
func (d *demo) retrainRecipe() (string, error) {
	r := d.zoo.Retrain
	if whole := r.Epochs(); d.epochs > 0 && d.epochs < whole && r.Schedule.Kind == "constant" {
		rate := &r.Optimiser.LearningRate
		*rate = max(*rate, min(3**rate*whole/d.epochs, 2*d.zoo.Train.Optimiser.LearningRate))
		r.Schedule.Kind = "triangular"
	}
	data, err := yaml.Marshal(r)
	if err != nil {
		return "", err
	}
	path := filepath.Join(d.folder, "retrain.yaml")
	return path, step.WriteFile(path, data, 0o644)
}

// reload waits until the promoted model answers and the sentinel watches it,
// with the load at full speed.
func (d *demo) reload(live *service, second *model) error {
	head, err := channel.Read(d.ctx, d.channel(), d.policy)
	if err != nil {
		return err
	}
	d.result.Sequence = head.Sequence
	if head.Model != digestOf(second.packed) {
		return fmt.Errorf("the channel names %s and not the promoted %s", head.Model, second.packed)
	}
	if err := live.sentinel.Load(d.ctx, live.source); err != nil {
		return err
	}
	if err := live.server.Load(d.ctx); err != nil {
		return err
	}
	if live.server.Digest() != head.Model {
		return fmt.Errorf("the server has %s and not the promoted %s", live.server.Digest(), head.Model)
	}
	select {
	case <-d.ctx.Done():
		return d.ctx.Err()
	case <-time.After(afterReload):
		return nil
	}
}

// again lets the same attacker try the promoted model.
func (d *demo) again(live *service, second *model, clean, hostile []float32, test *dataset.Set) error {
	var t *traffic
	err := d.phase("recovered", "%d clean requests to the model in service", func() (err error) {
		t, err = d.send(live, clean, test.Labels)
		return err
	}, test.Len())
	if err != nil {
		return err
	}
	d.answers.after = d.count(t, test)
	d.result.RecoveredCleanAccuracy = t.accuracy(test.Labels)
	d.event(report.Neutral, "clean traffic", "%s right", report.Percent(d.result.RecoveredCleanAccuracy))

	err = d.phase("transfer", "the first attack's %d images once more", func() (err error) {
		t, err = d.send(live, hostile, test.Labels)
		return err
	}, test.Len())
	if err != nil {
		return err
	}
	d.answers.afterSameImages = d.count(t, test)
	d.result.TransferAccuracy = t.accuracy(test.Labels)
	d.event(report.Neutral, "old attack", "%s right", report.Percent(d.result.TransferAccuracy))

	anew, err := d.attacker("attack", clean, test)
	if err != nil {
		return err
	}
	if d.result.RecoveredAccuracy, d.answers.afterHostile, err = d.strike(live, anew, test); err != nil {
		return err
	}
	d.result.Requests = int(d.requests.Load())
	d.result.LabelledAccuracy = *live.sentinel.Status().Right
	return nil
}
