package serve

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/gate"
	"github.com/temper-ml/temper/models/strictyaml"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/signing/verify"
)

// Bounds on the files that flags name.
const (
	maxKey    = 64 << 10 // many times a public key in PEM
	maxPolicy = strictyaml.MaxBytes
)

// flags are the command's.
type flags struct {
	model, channel      string
	name                string
	listen, adminListen string
	poll, drainDelay    time.Duration
	mirror              string
	mirrorFraction      float64
	namespace           string
	maxInFlight         int

	keys          []string
	signers       int
	repositories  []string
	revoked       []string
	policy        string
	datasetDigest string
}

// Command serves a model until it is told to stop.
func Command() *cobra.Command {
	var f flags
	cmd := &cobra.Command{
		Use:   "serve (--channel REF | --model REF) --key cosign.pub",
		Short: "Serve a signed model over HTTP",
		Long: `Serve a model by the Open Inference Protocol v2, which KServe and Triton speak.
The model must be signed by the given keys; with --policy the keys must also
attest figures that meet the gate policy. With --channel the server follows the
channel: a promotion is in service within --poll, without a dropped request. A
model that is not verified, or fails its self-test, is refused, and the one in
service goes on.

Pixels: FP32 from 0 to 1, or UINT8 from 0 to 255, as [N, channels, height, width].
Metrics, profiles, and load and unload are on --admin-listen: keep it private.

SIGTERM drains: requests in flight are answered, then the server ends with 0.`,
		Example: `  temper serve --channel localhost:5000/mnist:production --key cosign.pub
  temper serve --model oci:out:model --key cosign.pub --policy models/zoo/wong.yaml --listen :8080
  curl -s localhost:8080/v2/models/mnist/infer -d @request.json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	flags := cmd.Flags()
	flags.StringVar(&f.channel, "channel", "", "channel to follow, such as localhost:5000/mnist:production")
	flags.StringVar(&f.model, "model", "", "model to serve, by tag or digest")
	flags.StringVar(&f.name, "name", "", "the model's name in URLs (default: the last part of the repository's)")
	flags.StringVar(&f.listen, "listen", "127.0.0.1:8080", "address for inference")
	flags.StringVar(&f.adminListen, "admin-listen", "127.0.0.1:8081", "address for metrics and the model repository; empty for none")
	flags.DurationVar(&f.poll, "poll", 10*time.Second, "how often to look for another model; 0 for never")
	flags.DurationVar(&f.drainDelay, "drain-delay", 0, "how long to go on, not ready, after SIGTERM: until load balancers notice")
	flags.StringVar(&f.mirror, "mirror", "", "URL that gets a copy of each request as CloudEvents, such as a sentinel's")
	step.Fraction(flags, &f.mirrorFraction, "mirror-fraction", 1, "share of requests to mirror")
	flags.StringVar(&f.namespace, "namespace", "", "Kubernetes namespace to name in mirrored events")
	step.Int(flags, &f.maxInFlight, "max-in-flight", 0, 0, 1<<16, "requests at a time before others get 429 (default: 32 for each core)")
	flags.StringSliceVar(&f.keys, "key", nil, "public keys that may sign: files such as cosign.pub")
	step.Int(flags, &f.signers, "signers", 1, 1, 16, "how many different keys must have signed")
	flags.StringSliceVar(&f.repositories, "repository", nil, "other repositories that a signature may be for, such as registry.example/models/*")
	flags.StringSliceVar(&f.revoked, "revoked", nil, "digests that are never served")
	flags.StringVar(&f.policy, "policy", "", "YAML file of a model, such as models/zoo/wong.yaml, whose gate policy the signed figures must meet")
	flags.StringVar(&f.datasetDigest, "dataset-digest", "", "digest of the test images that the figures must be from (default: any)")
	cmd.MarkFlagsOneRequired("channel", "model")
	cmd.MarkFlagsMutuallyExclusive("channel", "model")
	cmd.MarkFlagRequired("key")
	return cmd
}

func (f *flags) run(cmd *cobra.Command) error {
	ctx, s := cmd.Context(), step.From(cmd)
	rules, err := f.rules()
	if err != nil {
		return step.BadInput(err)
	}
	if rules.Robustness == nil {
		s.Log.Warn("no --policy: every model that is signed is served, however robust")
	}
	var source Source = &Channel{Reference: f.channel, Policy: rules}
	if f.model != "" {
		source = &Artifact{Reference: f.model, Policy: rules}
	}
	if f.name == "" {
		f.name = defaultName(f.channel + f.model)
	}
	server, err := New(Options{
		Name: f.name, Source: source, Poll: f.poll, Log: s.Log,
		Mirror: f.mirror, MirrorFraction: f.mirrorFraction, Namespace: f.namespace,
		MaxInFlight: f.maxInFlight, DrainDelay: f.drainDelay,
	})
	if err != nil {
		return step.BadInput(err)
	}
	public, err := net.Listen("tcp", f.listen)
	if err != nil {
		return step.BadInput(fmt.Errorf("--listen: %w", err))
	}
	var admin net.Listener
	if f.adminListen != "" {
		if admin, err = net.Listen("tcp", f.adminListen); err != nil {
			public.Close()
			return step.BadInput(fmt.Errorf("--admin-listen: %w", err))
		}
	}

	s.Log.Info("listening", "url", "http://"+public.Addr().String(), "model", f.name)
	return exitError(server.Serve(ctx, public, admin))
}

// exitError gives a refused model its exit code. A registry that does not
// answer ends a server that has never been ready: Kubernetes starts it again,
// and waits longer each time. (Package step knows the registry's errors.)
func exitError(err error) error {
	var refused *LoadError
	if !errors.As(err, &refused) {
		return err
	}
	switch refused.Reason {
	case Unavailable:
		return refused.Err
	case Unverified:
		return step.Refused(refused.Err)
	}
	return step.BadInput(err)
}

// defaultName is the last part of a reference's repository: mnist for
// localhost:5000/models/mnist:production, and for oci:out/mnist:production.
func defaultName(ref string) string {
	ref, _, _ = strings.Cut(ref, "@")
	name := filepath.ToSlash(strings.TrimPrefix(ref, "oci:"))
	name = name[strings.LastIndexByte(name, '/')+1:]
	name, _, _ = strings.Cut(name, ":")
	return name
}

// rules reads what must be true of a model.
func (f *flags) rules() (verify.Policy, error) {
	rules := verify.Policy{Threshold: f.signers, Repositories: f.repositories, Revoked: f.revoked}
	for _, path := range f.keys {
		pem, err := readFile(path, maxKey)
		if err != nil {
			return rules, fmt.Errorf("--key: %w", err)
		}
		if strings.Contains(string(pem), "PRIVATE KEY") {
			return rules, fmt.Errorf("--key %s: it is a private key: give the .pub file beside it", path)
		}
		rules.Keys = append(rules.Keys, verify.Key{Name: filepath.Base(path), PEM: pem})
	}
	if f.policy == "" {
		if f.datasetDigest != "" {
			return rules, errors.New("--dataset-digest needs --policy")
		}
		return rules, nil
	}
	data, err := readFile(f.policy, maxPolicy)
	if err != nil {
		return rules, fmt.Errorf("--policy takes the YAML file of a model: %w", err)
	}
	p, err := parsePolicy(data)
	if err != nil {
		return rules, fmt.Errorf("--policy %s: %w", f.policy, err)
	}
	rules.Robustness = &verify.Requirement{
		Dataset: f.datasetDigest, Norm: p.Threat.Norm, Epsilon: p.Threat.Epsilon, Attacks: p.Attacks, Samples: p.MinSamples,
		Clean: p.MinCleanAccuracy, Robust: p.MinRobustAccuracy,
	}
	return rules, nil
}

// parsePolicy takes the gate policy out of a model's file of the zoo. Package
// zoo itself would link the training code, and with it Gorgonia, into the
// server.
func parsePolicy(data []byte) (gate.Policy, error) {
	var model struct {
		Name    yaml.Node     `yaml:"name"`
		Network yaml.Node     `yaml:"network"`
		Dataset yaml.Node     `yaml:"dataset"`
		Recipe  yaml.Node     `yaml:"recipe"`
		Threat  attack.Threat `yaml:"threat"`
		Policy  gate.Policy   `yaml:"policy"`
	}
	if err := strictyaml.Decode(data, &model); err != nil {
		return gate.Policy{}, err
	}
	model.Policy.Threat = model.Threat
	return model.Policy, model.Policy.Validate()
}

func readFile(path string, limit int64) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, limit)
	}
	return data, nil
}
