//go:build deps
package deps
import (
	_ "github.com/google/go-containerregistry/pkg/registry"
	
	_ "github.com/sigstore/cosign/v2/pkg/cosign"
	_ "github.com/sigstore/cosign/v2/pkg/signature"
	_ "github.com/sigstore/cosign/v2/pkg/oci/remote"
	_ "gorgonia.org/gorgonia"
	_ "github.com/modelpack/model-spec/schema"
	_ "github.com/sjwhitworth/golearn/evaluation"
	_ "github.com/sjwhitworth/golearn/meta"
	_ "github.com/spf13/cobra"
	_ "github.com/prometheus/client_golang/prometheus/promhttp"
	_ "github.com/cloudevents/sdk-go/v2"
	_ "github.com/mmcloughlin/avo/build"
	_ "golang.org/x/sys/cpu"
	_ "gonum.org/v1/gonum/stat/distuv"
	_ "google.golang.org/protobuf/encoding/protowire"
	_ "sigs.k8s.io/yaml"
	_ "go.yaml.in/yaml/v3"
	_ "github.com/schollz/progressbar/v3"
	_ "github.com/in-toto/attestation/go/v1"
	_ "golang.org/x/term"
)
import (
	_ "gorgonia.org/tensor"
	_ "go4.org/unsafe/assume-no-moving-gc"
	_ "golang.org/x/time/rate"
	_ "github.com/sigstore/sigstore/pkg/signature"
	_ "github.com/opencontainers/image-spec/specs-go/v1"
	_ "github.com/opencontainers/go-digest"
	_ "github.com/secure-systems-lab/go-securesystemslib/dsse"
	_ "golang.org/x/sync/errgroup"
	_ "github.com/secure-systems-lab/go-securesystemslib/encrypted"
	_ "github.com/chewxy/hm"
	
)
