// Package e2e tests Temper on a real cluster: real Argo Workflows, real Tekton,
// a real registry, real data. The tests need the build tag e2e and the cluster
// of `go tool task up`; `go tool task e2e` does both.
//
// They see what users see: the stock argo command line, kubectl and
// cosign, and the Services through the Kubernetes API. They wait for what they
// expect and for nothing else: no test sleeps for a fixed time.
package e2e
