package sentinel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/argoproj/argo-workflows/v3/pkg/client/clientset/versioned"
	"github.com/spf13/cobra"
	"golang.org/x/net/netutil"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/temper-ml/temper/models/detect"
	"github.com/temper-ml/temper/models/nn/graph"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/artifact"
	"github.com/temper-ml/temper/runners/step/serve"
	trust "github.com/temper-ml/temper/runners/step/verify"
	"github.com/temper-ml/temper/signing/store"
)

// Limits of the listener: a sender that is slower is cut off, so that
// half-open connections cannot pile up.
const (
	headerTimeout  = 5 * time.Second
	readTimeout    = 10 * time.Second
	writeTimeout   = 30 * time.Second
	idleTimeout    = 60 * time.Second
	maxHeader      = 16 << 10
	maxConnections = 1024
	drainTimeout   = 10 * time.Second
)

// Command is the step; it runs until it is interrupted.
func Command() *cobra.Command {
	var (
		model, channel, detector, listen, admin, defend string
		workflow, namespace, kubeconfig                 string
		evidence, anchorModel                           string
		anchors                                         []string
		who                                             trust.Trust
		c                                               Config
		poll                                            time.Duration
	)
	cmd := &cobra.Command{
		Use:   "sentinel --channel REF --key FILE",
		Short: "Watch a served model and start the defence when it is attacked",
		Long: `Take mirrored inference requests as CloudEvents (from 'temper serve --mirror', or
from the payload logger of a KServe InferenceService), score them with the
model's detector, and raise an alarm when they look hostile more often than
clean ones do: at most one false alarm in 1/alpha requests on average. Labels go
to POST /v2/feedback. GET / is a page for people, GET /status says how things
stand; prints the address.

The model and its detector must be signed by the key. A promotion is followed:
the new model is watched from then on, with its own detector. Before a channel's
first promotion the sentinel waits, and is not ready.

An incident starts one defence: with --workflow an Argo Workflow from that
template, with --defend a CloudEvent of type ` + IncidentEvent + `
to the URL. No more start in a day than the budget allows, none in the cooldown,
and none after some in a row led to no better model until a person approves:
'temper sentinel approve', or 'argo resume' of the workflow. With --state a
restarted sentinel goes on where it was.`,
		Example: `  temper sentinel calibrate --model oci:out:mnist --guard oci:out:guard
  temper sign --key cosign.key oci:out@sha256:...
  temper sentinel --channel oci:out:production --key cosign.pub
  temper sentinel --channel registry:5000/mnist:production --key cosign.pub --state sentinel.db --workflow defend --evidence registry:5000/mnist`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, st := cmd.Context(), step.From(cmd)
			policy, err := who.Rules(ctx)
			if err != nil {
				return err
			}
			source := &Registry{Reference: model + channel, Detector: detector, Policy: policy}
			source.Served = &serve.Channel{Reference: channel, Policy: policy}
			if model != "" {
				source.Served = &serve.Artifact{Reference: model, Policy: policy}
			}
			if poll <= 0 {
				return step.BadInput(fmt.Errorf("--poll %v: must be above 0", poll))
			}
			c.Log = st.Log
			switch {
			case defend != "":
				if c.Defence, err = NewWebhook(defend); err != nil {
					return step.BadInput(err)
				}
			case workflow != "":
				a, err := newArgo(ctx, kubeconfig, namespace, workflow, model+channel)
				if err != nil {
					return step.BadInput(err)
				}
				a.Step, a.Channel = st, channel
				c.Defence, c.Suspends = a, true
			}
			if evidence != "" {
				c.Keep = Keeper(evidence)
			}
			if err := readAnchors(ctx, &c, anchors, anchorModel); err != nil {
				return err
			}
			s, err := New(c)
			if err != nil {
				return step.BadInput(err)
			}
			defer s.Close()
			switch err := s.Load(ctx, source); {
			case err == nil:
			case channel != "" && serve.NotPromoted(err):
				st.Log.Info("waiting for the channel's first promotion", "channel", channel)
			default:
				return step.BadInput(err) // unless it says something more precise
			}
			private, err := net.Listen("tcp", admin)
			if err != nil {
				return step.BadInput(fmt.Errorf("admin: %w", err))
			}
			l, err := net.Listen("tcp", listen)
			if err != nil {
				private.Close()
				return step.BadInput(fmt.Errorf("listen: %w", err))
			}
			answer := struct {
				Address string `json:"address"`
				Admin   string `json:"admin"`
			}{l.Addr().String(), private.Addr().String()}
			st.Log.Info("listening", "address", answer.Address, "admin", answer.Admin)
			if err := st.Print(answer.Address, answer); err != nil {
				private.Close()
				l.Close()
				return err
			}
			go s.Follow(ctx, source, poll)
			ctx, cancel := context.WithCancel(ctx)
			served := make(chan error, 1)
			go func() {
				served <- serveOn(ctx, private, s.Admin(), st.Log)
				cancel()
			}()
			err = s.Serve(ctx, l)
			cancel()
			return errors.Join(err, <-served)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&channel, "channel", "", "reference of the channel that says which model is in service")
	flags.StringVar(&model, "model", "", "reference of the model in service, where there is no channel")
	flags.StringVar(&detector, "detector", "", "reference of its detector; by default the tag sha256-HEX.detector beside the model")
	who.Flags(flags, "key")
	flags.StringVar(&listen, "listen", "127.0.0.1:8090", "address to listen on; port 0 takes a free one")
	flags.StringVar(&admin, "admin", "127.0.0.1:8091", "address for 'temper sentinel approve'; keep it from all but people")
	step.Float(flags, &c.Alpha, "alpha", detect.DefaultAlpha, 1e-12, 0.1, "1/alpha is the least average number of requests to a false alarm")
	flags.StringVar(&defend, "defend", "", "URL that is told of an incident and starts the defence")
	flags.StringVar(&workflow, "workflow", "", "Argo WorkflowTemplate that is the defence, such as defend")
	flags.StringVar(&namespace, "namespace", "", "its namespace; by default the pod's, or that of the kubeconfig's context")
	flags.StringVar(&kubeconfig, "kubeconfig", "", "kubeconfig file; by default as for kubectl")
	flags.StringVar(&evidence, "evidence", "", "repository where the flagged requests of an attack, and the unusual ones of drift, are kept, as REPOSITORY:evidence-ID")
	flags.StringVar(&c.State, "state", "", "file that outlives a restart; by default nothing does")
	step.Int(flags, &c.Budget, "budget", DefaultBudget, 1, 1000, "defences started in 24 hours, at most")
	step.Int(flags, &c.Circuit, "circuit", DefaultCircuit, 1, 1000, "defences in a row without a better model until a person must approve")
	flags.StringArrayVar(&anchors, "anchor", nil, "data set whose test split every model in service is measured on; once for each, such as a clean and an attacked one")
	flags.StringVar(&anchorModel, "anchor-model", "", "model that sets the standard on them; by default the first one watched")
	step.Float(flags, &c.AnchorDrop, "anchor-drop", DefaultAnchorDrop, 0.0001, 1, "fall below the standard that opens the circuit")
	flags.BoolVar(&c.DefendAccuracy, "defend-accuracy", false, "start the defence for an alarm on labels too; they can be forged")
	flags.BoolVar(&c.AnyVersion, "any-version", false, "take every answer for one of the model: for servers that name versions in their own way")
	flags.DurationVar(&c.Cooldown, "cooldown", DefaultCooldown, "time after an incident in which none begins")
	flags.DurationVar(&poll, "poll", 10*time.Second, "how often to look for another model in service")
	cmd.MarkFlagsOneRequired("channel", "model")
	cmd.MarkFlagsMutuallyExclusive("channel", "model")
	cmd.MarkFlagsMutuallyExclusive("defend", "workflow")
	cmd.MarkFlagRequired("key")
	cmd.AddCommand(calibrate(), judge(), approve())
	return cmd
}

// newArgo makes the defence by a workflow, with the kubeconfig or the pod's
// service account.
func newArgo(ctx context.Context, kubeconfig, namespace, template, reference string) (*Argo, error) {
	r, err := store.Open(ctx, reference)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	a := &Argo{Template: template, Namespace: namespace, Model: r.Repository()}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = kubeconfig
	config := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{})
	if a.Namespace == "" {
		if a.Namespace, _, err = config.Namespace(); err != nil {
			return nil, fmt.Errorf("kubeconfig: %w", err)
		}
	}
	rest, err := config.ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	client, err := versioned.NewForConfig(rest)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	a.API = client.ArgoprojV1alpha1()
	return a, nil
}

// readAnchors reads the anchor sets and the anchor model.
func readAnchors(ctx context.Context, c *Config, anchors []string, model string) error {
	if model != "" && len(anchors) == 0 {
		return step.BadInput(errors.New("--anchor-model needs an --anchor to be measured on"))
	}
	for _, ref := range anchors {
		splits, err := artifact.OpenDataset(ctx, ref)
		if err != nil {
			return err
		}
		c.Anchors = append(c.Anchors, Examples{Name: ref, Shape: splits.Test.Shape, Images: splits.Test, Labels: splits.Test.Labels})
	}
	if model != "" {
		m, err := artifact.ReadModel(ctx, model)
		if err != nil {
			return err
		}
		c.AnchorModel = m.Network
	}
	return nil
}

// approve is the step by which a person closes the circuit.
func approve() *cobra.Command {
	var admin string
	cmd := &cobra.Command{
		Use:   "approve",
		Short: "Let the sentinel start defences again after some led to no better model",
		Long: `Close the circuit of a sentinel: after some defences in a row without a better
model it starts none until a person has looked and approves. One that waits
starts at once. A defence by an Argo workflow is approved with 'argo resume'.`,
		Example: `  temper sentinel approve
  kubectl port-forward deployment/sentinel 8091 & temper sentinel approve`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			req, err := http.NewRequestWithContext(cmd.Context(), http.MethodPost, "http://"+admin+"/approve", nil)
			if err != nil {
				return step.BadInput(fmt.Errorf("--admin %q: must be HOST:PORT", admin))
			}
			req.Header.Set(approveHeader, "yes")
			resp, err := (&http.Client{Timeout: readTimeout}).Do(req)
			if err != nil {
				return step.Unavailable(fmt.Errorf("the sentinel does not answer: %w", err))
			}
			defer resp.Body.Close()
			if resp.StatusCode != http.StatusNoContent {
				return fmt.Errorf("the sentinel answered %s", resp.Status)
			}
			return step.From(cmd).Print("approved", map[string]bool{"approved": true})
		},
	}
	cmd.Flags().StringVar(&admin, "admin", "127.0.0.1:8091", "the sentinel's --admin address")
	return cmd
}

// Serve serves Handler on l until ctx is done, and then lets the events in
// progress end.
func (s *Sentinel) Serve(ctx context.Context, l net.Listener) error {
	beat, stop := context.WithCancel(ctx)
	defer stop()
	go func() { // the clock moves without traffic too
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-beat.Done():
				return
			case <-tick.C:
				s.change(func(time.Time) {})
			}
		}
	}()
	return serveOn(ctx, l, s.Handler(), s.log)
}

func serveOn(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	server := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: maxHeader,
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(netutil.LimitListener(l, maxConnections)) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	if err := server.Shutdown(drain); err != nil {
		server.Close()
	}
	if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve: %w", err)
	}
	return nil
}

// attackBatch is the number of images attacked at once.
const attackBatch = 64

// calibrate is the step that makes a detector.
func calibrate() *cobra.Command {
	var model, guard, data, output string
	cmd := &cobra.Command{
		Use:   "calibrate --model REF --guard REF",
		Short: "Make the detector of a model",
		Long: `Calibrate a detector for a model, with a small robust network as its guard, on
the data set's validation split and on attacks that it makes on it, and push it. Prints its reference with the
digest. Sign it with 'temper sign': the sentinel takes no other.`,
		Example: `  temper sentinel calibrate --model oci:out:mnist --guard oci:out:guard
  temper sentinel calibrate --model registry:5000/mnist@sha256:... --guard guard.onnx --dataset ./fashion --output registry:5000/mnist:detector`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, st := cmd.Context(), step.From(cmd)
			served, err := artifact.ReadModel(ctx, model)
			if err != nil {
				return err
			}
			if output == "" {
				if served.Manifest == "" {
					return step.BadInput(fmt.Errorf("--output is needed where the model is a file"))
				}
				if output, err = DetectorAt(ctx, served.Reference); err != nil {
					return err
				}
			}
			with, err := artifact.ReadModel(ctx, guard)
			if err != nil {
				return err
			}
			splits, err := artifact.OpenDataset(ctx, data)
			if err != nil {
				return err
			}
			clean := splits.Validation
			if clean.Len() > 0 && clean.Shape != served.Network.Input {
				return step.BadInput(fmt.Errorf("dataset %s has images of %v, the model takes %v", data, clean.Shape, served.Network.Input))
			}
			half := clean.Len() / 2
			gradients, err := graph.NewAttack(served.Network, attackBatch)
			if err != nil {
				return err
			}
			d, err := detect.Calibrate(ctx, gradients, with.Network, clean.Slice(0, half), clean.Slice(half, clean.Len()))
			if err != nil {
				return step.BadInput(err)
			}
			answer := struct {
				Reference string  `json:"reference"`
				Digest    string  `json:"digest"`
				Threshold float64 `json:"threshold"`
				Bound     float64 `json:"flagged_bound"`
				Caught    float64 `json:"caught"` // share of the calibration's attacks that is flagged
			}{Threshold: d.Calibration.Attack.Threshold, Bound: d.Calibration.Attack.Bound, Caught: d.Calibration.Caught}
			if answer.Reference, err = PushDetector(ctx, output, d); err != nil {
				return err
			}
			r, err := store.Open(ctx, answer.Reference)
			if err != nil {
				return err
			}
			defer r.Close()
			answer.Digest = r.Digest()
			if err := st.Results(map[string]string{"reference": answer.Reference, "digest": answer.Digest}); err != nil {
				return err
			}
			return st.Print(answer.Reference, answer)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&model, "model", "", "the model: a reference, or an ONNX file")
	flags.StringVar(&guard, "guard", "", "a small robust network: a reference, or an ONNX file")
	flags.StringVar(&data, "dataset", "mnist", "mnist, a folder of IDX files, of images or of CIFAR-10, URL#sha256:..., or a reference")
	flags.StringVar(&output, "output", "", "where to push the detector; by default the tag sha256-HEX.detector beside the model")
	cmd.MarkFlagRequired("model")
	cmd.MarkFlagRequired("guard")
	return cmd
}
