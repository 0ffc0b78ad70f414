package serve

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/runners/step"
	trust "github.com/temper-ml/temper/runners/step/verify"
)

// flags are the command's.
type flags struct {
	model, channel     string
	name               string
	listen, grpcListen string
	adminListen        string
	poll, drainDelay   time.Duration
	mirror             string
	mirrorFraction     float64
	namespace          string
	maxInFlight        int

	trust trust.Trust
}

// Command serves a model until it is told to stop.
func Command() *cobra.Command {
	var f flags
	cmd := &cobra.Command{
		Use:   "serve (--channel REF | --model REF) --key cosign.pub",
		Short: "Serve a signed model over HTTP and gRPC",
		Long: `Serve a model by the Open Inference Protocol v2, which KServe and Triton speak.
The model must be signed by the given keys; with --policy the keys must also
attest figures that meet the gate policy. With --channel the server follows the
channel: a promotion is in service within --poll, without a dropped request. A
model that is not verified, or fails its self-test, is refused, and the one in
service goes on. A model that "temper revoke" names goes out of service.

Pixels: FP32 from 0 to 1, or UINT8 from 0 to 255, as [N, channels, height, width].
Metrics, profiles, and load and unload are on --admin-listen: keep it private.

SIGTERM drains: requests in flight are answered, then the server ends with 0.`,
		Example: `  temper serve --channel localhost:5000/mnist:production --key cosign.pub
  temper serve --model oci:out:model --key cosign.pub --policy wong --listen :8080
  curl -s localhost:8080/v2/models/mnist/infer -d @request.json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	flags := cmd.Flags()
	flags.StringVar(&f.channel, "channel", "", "channel to follow, such as localhost:5000/mnist:production")
	flags.StringVar(&f.model, "model", "", "model to serve, by tag or digest")
	flags.StringVar(&f.name, "name", "", "the model's name in URLs (default: the last part of the repository's)")
	flags.StringVar(&f.listen, "listen", "127.0.0.1:8080", "address for inference")
	flags.StringVar(&f.grpcListen, "grpc-listen", "127.0.0.1:9000", "address for inference by gRPC; empty for none")
	flags.StringVar(&f.adminListen, "admin-listen", "127.0.0.1:8081", "address for metrics and the model repository; empty for none")
	flags.DurationVar(&f.poll, "poll", 10*time.Second, "how often to look for another model; 0 for never")
	flags.DurationVar(&f.drainDelay, "drain-delay", 0, "how long to go on, not ready, after SIGTERM: until load balancers notice")
	flags.StringVar(&f.mirror, "mirror", "", "URL that gets a copy of each request as CloudEvents, such as a sentinel's")
	step.Fraction(flags, &f.mirrorFraction, "mirror-fraction", 1, "share of requests to mirror; 0 for none")
	flags.StringVar(&f.namespace, "namespace", "", "Kubernetes namespace to name in mirrored events")
	step.Int(flags, &f.maxInFlight, "max-in-flight", 0, 0, 1<<16, "requests at a time before others get 429 (default: 32 for each core)")
	f.trust.Flags(flags, "key")
	cmd.MarkFlagsOneRequired("channel", "model")
	cmd.MarkFlagsMutuallyExclusive("channel", "model")
	cmd.MarkFlagRequired("key")
	return cmd
}

func (f *flags) run(cmd *cobra.Command) error {
	ctx, s := cmd.Context(), step.From(cmd)
	rules, err := f.trust.Rules(ctx)
	if err != nil {
		return err
	}
	if rules.Robustness == nil {
		s.Log.Warn("no --policy: every model that is signed is served, however robust")
	}
	var source Source = &Channel{Reference: f.channel, Policy: rules}
	if f.model != "" {
		source = &Artifact{Reference: f.model, Policy: rules}
	}
	if f.mirrorFraction == 0 { // which Options take for their default
		f.mirror = ""
	}
	if f.name == "" {
		f.name = DefaultName(f.channel + f.model)
	}
	traces, sendTraces, err := traceProvider(ctx, f.name)
	if err != nil {
		return step.BadInput(err)
	}
	listeners, err := listen("listen", f.listen, "grpc-listen", f.grpcListen, "admin-listen", f.adminListen)
	if err != nil {
		return step.BadInput(err)
	}
	public, grpc, admin := listeners[0], listeners[1], listeners[2]
	server, err := New(Options{
		Name: f.name, Source: source, Poll: f.poll, Log: s.Log,
		Mirror: f.mirror, MirrorFraction: f.mirrorFraction, Namespace: f.namespace,
		GRPC: grpc, Traces: traces,
		MaxInFlight: f.maxInFlight, DrainDelay: f.drainDelay,
	})
	if err != nil {
		closeAll(listeners)
		return step.BadInput(err)
	}

	s.Log.Info("listening", "url", "http://"+public.Addr().String(), "model", f.name)
	err = exitError(server.Serve(ctx, public, admin))
	flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
	defer cancel()
	if e := sendTraces(flush); e != nil {
		s.Log.Warn("traces were lost", "error", e.Error())
	}
	return err
}

// flushTimeout is for the traces that are left when the server stops.
const flushTimeout = 5 * time.Second

// listen listens on each address that is not empty, named by its flag.
func listen(flagAndAddress ...string) (listeners []net.Listener, err error) {
	for i := 0; i < len(flagAndAddress); i += 2 {
		var l net.Listener
		if address := flagAndAddress[i+1]; address != "" {
			if l, err = net.Listen("tcp", address); err != nil {
				closeAll(listeners)
				return nil, fmt.Errorf("--%s: %w", flagAndAddress[i], err)
			}
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}

func closeAll(listeners []net.Listener) {
	for _, l := range listeners {
		if l != nil {
			l.Close()
		}
	}
}

// exitError gives a refused model its exit code. A registry that does not
// answer ends a server that has never been ready: Kubernetes starts it again,
// and waits longer each time. (Package step knows the registry's errors.)
func exitError(err error) error {
	var refused *LoadError
	if !errors.As(err, &refused) {
		return err
	}
	switch {
	case errors.Is(refused.Err, context.DeadlineExceeded): // loading took too long
		return step.Unavailable(refused.Err)
	case refused.Reason == Unavailable:
		return refused.Err
	case refused.Reason == Unverified, refused.Reason == Revoked:
		return step.Refused(refused.Err)
	}
	return step.BadInput(err)
}

// DefaultName is a model's name in URLs where none is given: the last part of a
// reference's repository, such as mnist for localhost:5000/models/mnist:production
// and for oci:out/mnist:production.
func DefaultName(ref string) string {
	ref, _, _ = strings.Cut(ref, "@")
	name := filepath.ToSlash(strings.TrimPrefix(ref, "oci:"))
	name = name[strings.LastIndexByte(name, '/')+1:]
	name, _, _ = strings.Cut(name, ":")
	return name
}
