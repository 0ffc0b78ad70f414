package sentinel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/net/netutil"

	"github.com/temper-ml/temper/models/detect"
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
		model, channel, detector, listen, defend string
		who                                      trust.Trust
		c                                        Config
		poll                                     time.Duration
	)
	cmd := &cobra.Command{
		Use:   "sentinel --channel REF --key FILE",
		Short: "Watch a served model and start the defence when it is attacked",
		Long: `Take mirrored inference requests as CloudEvents (from 'temper serve --mirror', or
from the payload logger of a KServe InferenceService), score them with the
model's detector, and raise an alarm when they look hostile more often than
clean ones do: at most one false alarm in 1/alpha requests on average. Labels go
to POST /v2/feedback. GET /status says how things stand; prints the address.

The model and its detector must be signed by the key. A promotion is followed:
the new model is watched from then on, with its own detector. With --defend an
alarm is posted to the URL as a CloudEvent of type ` + IncidentEvent + `,
once for each incident.`,
		Example: `  temper sentinel calibrate --model oci:out:mnist --guard oci:out:guard
  temper sign --key cosign.key oci:out@sha256:...
  temper sentinel --channel oci:out:production --key cosign.pub
  temper sentinel --channel registry:5000/mnist:production --key cosign.pub --defend http://defend-eventsource:12000/`,
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
			if defend != "" {
				if c.Defence, err = NewWebhook(defend); err != nil {
					return step.BadInput(err)
				}
			}
			c.Log = st.Log
			s, err := New(c)
			if err != nil {
				return step.BadInput(err)
			}
			defer s.Close()
			if err := s.Load(ctx, source); err != nil {
				return step.BadInput(err) // unless it says something more precise
			}
			l, err := net.Listen("tcp", listen)
			if err != nil {
				return step.BadInput(fmt.Errorf("listen: %w", err))
			}
			answer := struct {
				Address string `json:"address"`
			}{l.Addr().String()}
			st.Log.Info("listening", "address", answer.Address)
			if err := st.Print(answer.Address, answer); err != nil {
				l.Close()
				return err
			}
			go s.Follow(ctx, source, poll)
			return s.Serve(ctx, l)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&channel, "channel", "", "reference of the channel that says which model is in service")
	flags.StringVar(&model, "model", "", "reference of the model in service, where there is no channel")
	flags.StringVar(&detector, "detector", "", "reference of its detector; by default the tag sha256-HEX.detector beside the model")
	who.Flags(flags, "key")
	flags.StringVar(&listen, "listen", "127.0.0.1:8090", "address to listen on; port 0 takes a free one")
	step.Float(flags, &c.Alpha, "alpha", detect.DefaultAlpha, 1e-12, 0.1, "1/alpha is the least average number of requests to a false alarm")
	flags.StringVar(&defend, "defend", "", "URL that is told of an incident and starts the defence")
	flags.BoolVar(&c.DefendAccuracy, "defend-accuracy", false, "start the defence for an alarm on labels too; they can be forged")
	flags.BoolVar(&c.AnyVersion, "any-version", false, "take every answer for one of the model: for servers that name versions in their own way")
	flags.DurationVar(&c.Cooldown, "cooldown", DefaultCooldown, "time after an incident in which none begins")
	flags.DurationVar(&poll, "poll", 10*time.Second, "how often to look for another model in service")
	cmd.MarkFlagsOneRequired("channel", "model")
	cmd.MarkFlagsMutuallyExclusive("channel", "model")
	cmd.MarkFlagRequired("key")
	cmd.AddCommand(calibrate())
	return cmd
}

// Serve serves Handler on l until ctx is done, and then lets the events in
// progress end.
func (s *Sentinel) Serve(ctx context.Context, l net.Listener) error {
	server := &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: headerTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: maxHeader,
		ErrorLog:       slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
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

// calibrate is the step that makes a detector.
func calibrate() *cobra.Command {
	var model, guard, data, output string
	cmd := &cobra.Command{
		Use:   "calibrate --model REF --guard REF",
		Short: "Make the detector of a model",
		Long: `Calibrate a detector for a model, with a small robust network as its guard, on
the data set's validation split, and push it. Prints its reference with the
digest. Sign it with 'temper sign': the sentinel takes no other.`,
		Example: `  temper sentinel calibrate --model oci:out:mnist --guard oci:out:guard
  temper sentinel calibrate --model registry:5000/mnist@sha256:... --guard guard.onnx --dataset fashion --output registry:5000/mnist:detector`,
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
			d, err := detect.Calibrate(served.Network, with.Network, clean.Slice(0, half), clean.Slice(half, clean.Len()))
			if err != nil {
				return step.BadInput(err)
			}
			answer := struct {
				Reference string  `json:"reference"`
				Digest    string  `json:"digest"`
				Threshold float64 `json:"threshold"`
				Bound     float64 `json:"flagged_bound"`
			}{Threshold: d.Calibration.Threshold, Bound: d.Calibration.Bound}
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
	flags.StringVar(&data, "dataset", "mnist", "mnist, a folder of IDX files, URL#sha256:..., or a reference")
	flags.StringVar(&output, "output", "", "where to push the detector; by default the tag sha256-HEX.detector beside the model")
	cmd.MarkFlagRequired("model")
	cmd.MarkFlagRequired("guard")
	return cmd
}
