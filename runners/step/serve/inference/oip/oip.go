// Package oip is the gRPC side of the Open Inference Protocol, generated from
// its published description, open_inference_grpc.proto:
// https://github.com/kserve/open-inference-protocol at commit
// d49cc23f89d709d87b210ef9449e273ae243984e, unchanged, Apache-2.0, copyright
// 2023 The KServe Authors.
package oip

//go:generate go run github.com/bufbuild/buf/cmd/buf@v1.75.0 generate
