package serve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"github.com/temper-ml/temper/runners/step/serve/inference"
	"github.com/temper-ml/temper/runners/step/serve/inference/oip"
)

// Limits of gRPC, beside those of every listener and of requests.
const (
	// maxMessage is gRPC's own default, which clients know; 256 images of 32 x
	// 32 in colour are 3 MB.
	maxMessage = 4 << 20
	// streamsPerAdmitted bounds the streams of all connections, those that are
	// still being read included, as a multiple of the requests admitted. With
	// maxMessage it bounds their memory.
	streamsPerAdmitted = 2
	// minKeepalive is how often a client may ping.
	minKeepalive = 10 * time.Second
)

// retryPushback is the trailer by which gRPC clients learn when to try again
// (gRFC A6), as Retry-After tells clients of HTTP.
const (
	retryPushback = "grpc-retry-pushback-ms"
	retryMillis   = "1000"
)

// requestID is the metadata key of an answer's id: X-Request-Id over HTTP.
const requestID = "x-request-id"

// grpcServer serves the protocol's gRPC half.
func (s *Server) grpcServer() *grpc.Server {
	streams := make(chan struct{}, streamsPerAdmitted*cap(s.admitted))
	options := []grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeader),
		grpc.MaxConcurrentStreams(uint32(cap(s.admitted))), // of one connection: it must not take all streams
		grpc.ConnectionTimeout(headerTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idleTimeout, Time: idleTimeout, Timeout: readTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minKeepalive, PermitWithoutStream: true}),
		grpc.InTapHandle(func(ctx context.Context, info *tap.Info) (context.Context, error) {
			select {
			case streams <- struct{}{}:
			default:
				s.metrics.refused.WithLabelValues(overload).Inc()
				return nil, status.Errorf(codes.ResourceExhausted, "overloaded: %d streams are open", cap(streams))
			}
			// A stream's context ends with the stream. Until then it has the
			// time that a request of HTTP has.
			limited, cancel := context.WithTimeout(ctx, readTimeout)
			context.AfterFunc(limited, func() { <-streams })
			context.AfterFunc(ctx, cancel)
			return limited, nil
		}),
		grpc.UnaryInterceptor(s.intercept),
	}
	if s.o.Traces != nil {
		options = append(options, grpc.StatsHandler(otelgrpc.NewServerHandler(otelgrpc.WithTracerProvider(s.o.Traces), otelgrpc.WithPropagators(propagator), otelgrpc.WithMeterProvider(noMetrics))))
	}
	server := grpc.NewServer(options...)
	oip.RegisterGRPCInferenceServiceServer(server, &service{server: s})
	return server
}

// serveGRPC serves until drain is called, which waits for the requests in
// flight as long as its context lasts.
func (s *Server) serveGRPC(l net.Listener) (serve func() error, drain func(context.Context) error) {
	server := s.grpcServer()
	drain = func(ctx context.Context) error {
		done := make(chan struct{})
		go func() {
			server.GracefulStop()
			close(done)
		}()
		select {
		case <-done:
			return nil
		case <-ctx.Done():
			server.Stop()
			<-done
			return ctx.Err()
		}
	}
	return func() error { return server.Serve(l) }, drain
}

// grpcCodes are the codes of refusals, by their HTTP status.
var grpcCodes = map[int]codes.Code{
	http.StatusBadRequest:            codes.InvalidArgument,
	http.StatusNotFound:              codes.NotFound,
	http.StatusRequestTimeout:        codes.DeadlineExceeded,
	http.StatusRequestEntityTooLarge: codes.InvalidArgument,
	http.StatusTooManyRequests:       codes.ResourceExhausted,
	http.StatusServiceUnavailable:    codes.Unavailable,
	http.StatusInternalServerError:   codes.Internal,
}

// intercept gives an error its code, one log line, and its place in the
// metrics, as handle does over HTTP.
func (s *Server) intercept(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (response any, err error) {
	method := info.FullMethod[len("/"+oip.GRPCInferenceService_ServiceDesc.ServiceName+"/"):]
	defer func() {
		if cause := recover(); cause != nil {
			s.o.Log.Error("panic in a handler", "cause", fmt.Sprint(cause), "stack", string(debug.Stack()))
			err = errors.New("internal error")
		}
		var no *refusal
		switch {
		case err == nil:
			s.metrics.grpc.WithLabelValues(method, codes.OK.String()).Inc()
			return
		case !errors.As(err, &no):
			no = &refusal{http.StatusInternalServerError, internal, err}
		}
		code := grpcCodes[no.code]
		s.metrics.grpc.WithLabelValues(method, code.String()).Inc()
		if method == "ModelInfer" {
			s.metrics.refused.WithLabelValues(no.reason).Inc()
			if code == codes.ResourceExhausted || code == codes.Unavailable {
				grpc.SetTrailer(ctx, metadata.Pairs(retryPushback, retryMillis))
			}
		}
		client := ""
		if p, ok := peer.FromContext(ctx); ok {
			client, _, _ = net.SplitHostPort(p.Addr.String())
		}
		s.log.warn("request refused", slog.String("status", code.String()), slog.String("reason", no.reason), slog.String("error", cut(no.Error())),
			slog.String("method", method), slog.String("client", client))
		response, err = nil, status.Error(code, no.Error())
	}()
	return handler(ctx, request)
}

// service is inference.GRPCInferenceService.
type service struct {
	oip.UnimplementedGRPCInferenceServiceServer
	server *Server
}

func (g *service) ServerLive(context.Context, *oip.ServerLiveRequest) (*oip.ServerLiveResponse, error) {
	return &oip.ServerLiveResponse{Live: true}, nil
}

func (g *service) ServerReady(context.Context, *oip.ServerReadyRequest) (*oip.ServerReadyResponse, error) {
	return &oip.ServerReadyResponse{Ready: g.server.Ready()}, nil
}

// ModelReady is false where HTTP says why not: the message has no room for it.
func (g *service) ModelReady(_ context.Context, q *oip.ModelReadyRequest) (*oip.ModelReadyResponse, error) {
	err := g.server.checkReady(q.GetName(), q.GetVersion())
	var no *refusal
	if errors.As(err, &no) && no.code == http.StatusNotFound {
		return nil, err
	}
	return &oip.ModelReadyResponse{Ready: err == nil}, nil
}

func (g *service) ServerMetadata(context.Context, *oip.ServerMetadataRequest) (*oip.ServerMetadataResponse, error) {
	return &oip.ServerMetadataResponse{Name: serverName, Version: version()}, nil
}

func (g *service) ModelMetadata(_ context.Context, q *oip.ModelMetadataRequest) (*oip.ModelMetadataResponse, error) {
	m, err := g.server.describe(q.GetName(), q.GetVersion())
	if err != nil {
		return nil, err
	}
	tensors := func(list []tensor) (messages []*oip.ModelMetadataResponse_TensorMetadata) {
		for _, t := range list {
			messages = append(messages, &oip.ModelMetadataResponse_TensorMetadata{Name: t.Name, Datatype: t.Datatype, Shape: t.Shape})
		}
		return messages
	}
	return &oip.ModelMetadataResponse{
		Name: m.Name, Versions: m.Versions, Platform: m.Platform,
		Inputs: tensors(m.Inputs), Outputs: tensors(m.Outputs), Properties: m.Parameters,
	}, nil
}

func (g *service) ModelInfer(ctx context.Context, q *oip.ModelInferRequest) (*oip.ModelInferResponse, error) {
	s := g.server
	j := jobs.Get().(*job)
	defer j.free()
	answer, outputs, err := s.classify(ctx, j, q.GetModelName(), q.GetModelVersion(), func(maxValues int) error {
		return j.request.ParseMessage(q, maxValues)
	})
	if err != nil {
		return nil, err
	}
	id := newID()
	if answer.ID == "" {
		answer.ID = id
	}
	if s.mirror.sample() {
		s.mirrorPixels(id, j, &answer, outputs)
	}
	grpc.SetHeader(ctx, metadata.Pairs(requestID, id)) // fails only where the client has gone
	return answer.Message(outputs), nil
}

// mirrorPixels mirrors a request that came by gRPC as if it had come by HTTP:
// that is what the sinks of KServe's logger understand.
func (s *Server) mirrorPixels(id string, j *job, answer *inference.Answer, outputs []inference.Output) {
	var request, response payload
	request.body, request.headerLength = inference.AppendRequest(j.body[:0], j.rows.pixels, j.rows.n, j.shape, true)
	response.body, response.headerLength = answer.Append(j.response[:0], outputs)
	j.body, j.response = request.body, response.body
	s.mirror.add(id, request, response)
}
