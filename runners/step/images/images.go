// Package images is the command that publishes the runners as container
// images.
package images

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/keygen"
	"github.com/temper-ml/temper/signing/sign"
	"github.com/temper-ml/temper/signing/store"
)

// Home is where released images are, and how the manifests under workflows/
// name them: Home/PROGRAM.
const Home = "ghcr.io/temper-ml"

// Image is one published image, in the words of a kustomization's "images".
type Image struct {
	Name    string `json:"name"`    // in the manifests
	NewName string `json:"newName"` // where it is
	Digest  string `json:"digest"`
}

// Result is what the command prints.
type Result struct {
	Images []Image `json:"images"`
}

// Job is one publication.
type Job struct {
	Programs   []string // files
	Repository string   // images go to Repository/NAME
	Tag        string   // "" for none
	Key        string   // private key; "" leaves the images unsigned
}

// Run publishes and says what it published. It looks at every program before
// it pushes one.
func (j *Job) Run(ctx context.Context, s *step.Step) error {
	var key *sign.Key
	if j.Key != "" {
		var err error
		if key, err = keygen.Load(ctx, j.Key); err != nil {
			return err
		}
	}
	var programs []*Program
	for _, path := range j.Programs {
		p, err := Read(path)
		if err != nil {
			return step.BadInput(err)
		}
		programs = append(programs, p)
	}
	var result Result
	var references []string
	for i, p := range programs {
		ref, err := p.publish(ctx, j.Repository+"/"+p.Name, j.Tag, key)
		if err != nil {
			return fmt.Errorf("image %s: %w", p.Name, err)
		}
		repository, digest, _ := strings.Cut(ref, "@")
		result.Images = append(result.Images, Image{Home + "/" + p.Name, repository, digest})
		references = append(references, ref)
		s.Log.Info("published", "image", ref, "signed", key != nil)
		s.Progress(i+1, len(programs))
	}
	all := strings.Join(references, "\n")
	// By this name Tekton Chains finds what it is to attest to.
	if err := s.Results(map[string]string{"IMAGES": all}); err != nil {
		return err
	}
	return s.Print(all, result)
}

// publish pushes the image and, as its referrer, the bill of materials, signs
// both, and returns the image's reference with its digest.
func (p *Program) publish(ctx context.Context, repository, tag string, key *sign.Key) (string, error) {
	image, err := p.Image()
	if err != nil {
		return "", err
	}
	bill, err := p.Bill()
	if err != nil {
		return "", err
	}
	hash, err := image.Digest()
	if err != nil {
		return "", err
	}
	digest := hash.String()
	r, err := store.Open(ctx, repository+"@"+digest)
	if err != nil {
		return "", step.BadInput(err)
	}
	defer r.Close()
	if err := r.Explain(remote.Write(r.Name(), image, r.Options(ctx)...)); err != nil {
		return "", err
	}
	about, err := r.At("")
	if err != nil {
		return "", err
	}
	if _, err := about.Push(ctx, &store.Artifact{
		Type: BillType, Subject: digest,
		Files: []store.File{{Name: "bom.json", MediaType: BillType, Data: bill}},
	}); err != nil {
		return "", fmt.Errorf("bill of materials: %w", err)
	}
	if key != nil {
		if _, err := key.Sign(ctx, r.String()); err != nil {
			return "", err
		}
		if _, err := key.Attest(ctx, r.String(), PredicateType, json.RawMessage(bill)); err != nil {
			return "", err
		}
	}
	if tag != "" { // last: what a tag names is whole
		at, err := r.At(tag)
		if err != nil {
			return "", step.BadInput(err)
		}
		if err := at.SetTag(ctx, digest); err != nil {
			return "", err
		}
	}
	return r.String(), nil
}

// Command is the command.
func Command() *cobra.Command {
	var j Job
	var bin string
	cmd := &cobra.Command{
		Use:   "images --repository REPOSITORY [PROGRAM...]",
		Short: "Publish programs as container images",
		Long: `Publish static Go programs as container images: each image holds the program,
certificate authorities and nothing else, and runs as a user of no rights. An
image is a function of its program: the same one gives the same digest.

With each image goes its bill of materials (CycloneDX), as a referrer. With
--key both are signed. Prints the references, with digests; -o json prints the
"images" of a kustomization.`,
		Example: `  CGO_ENABLED=0 go build -trimpath -o bin/ ./runners/...
  temper images --repository localhost:5001/temper --tag dev --key cosign.key
  temper images --repository oci:out bin/serve`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if j.Programs = args; len(args) == 0 {
				entries, err := os.ReadDir(bin)
				if err != nil {
					return step.BadInput(fmt.Errorf("%w: build the programs first, or say where they are with --bin", err))
				}
				for _, e := range entries {
					j.Programs = append(j.Programs, filepath.Join(bin, e.Name()))
				}
			}
			return j.Run(cmd.Context(), step.From(cmd))
		},
	}
	cmd.Flags().StringVar(&j.Repository, "repository", "", "where the images go, each under its program's name")
	cmd.Flags().StringVar(&j.Tag, "tag", "", "tag of each image; without it they are known by digest alone")
	cmd.Flags().StringVar(&j.Key, "key", "", "private key to sign with (its password: $COSIGN_PASSWORD)")
	cmd.Flags().StringVar(&bin, "bin", "bin", "folder of the programs, where none is named")
	cmd.MarkFlagRequired("repository")
	return cmd
}
