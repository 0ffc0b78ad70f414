package submit

import (
	"fmt"
	"strings"

	"github.com/argoproj/argo-workflows/v3/pkg/client/clientset/versioned"
	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/kube"
)

// Command is the step.
func Command() *cobra.Command {
	var (
		j          Job
		parameters []string
		kubeconfig string
	)
	cmd := &cobra.Command{
		Use:   "submit --template NAME [-p KEY=VALUE]...",
		Short: "Run an Argo Workflow from an installed template",
		Long: `Run an Argo Workflow from a WorkflowTemplate of the namespace, tell its progress,
wait for it and hand on its output parameters as results. The same template with
the same parameters is the same workflow: to run submit again finds it. A
workflow that rejects its model is a success, with the verdict "rejected"; one
that fails gives the exit code of the step that failed.

Inside a cluster it uses the pod's service account, elsewhere your kubeconfig.
SIGTERM ends the waiting, not the workflow: run submit again to go on.
Prints the workflow's name, or all with -o json.`,
		Example: `  temper submit --template robustify -p definition=wong -p repository=registry.registry.svc.cluster.local:5000/mnist
  temper submit --template robustify --name robustify-1f2e3d -p 'candidates=[{"recipe": "fast", "seed": "1"}]' -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			j.Parameters = map[string]string{}
			for _, p := range parameters {
				name, value, ok := strings.Cut(p, "=")
				if _, twice := j.Parameters[name]; !ok || name == "" || twice {
					return step.BadInput(fmt.Errorf("parameter %.80q: write each as KEY=VALUE, once", p))
				}
				j.Parameters[name] = value
			}
			config, namespace, err := kube.Config(kubeconfig)
			if err != nil {
				return err
			}
			if j.Namespace == "" {
				j.Namespace = namespace
			}
			client, err := versioned.NewForConfig(config)
			if err != nil {
				return step.BadInput(fmt.Errorf("kubeconfig: %w", err))
			}
			j.API = client.ArgoprojV1alpha1()
			return j.Run(cmd.Context(), step.From(cmd))
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&j.Template, "template", "robustify", "the WorkflowTemplate")
	flags.StringVar(&j.Name, "name", "", "name of the workflow (default: made of template and parameters)")
	flags.StringArrayVarP(&parameters, "parameter", "p", nil, "parameter of the workflow, KEY=VALUE; once for each")
	flags.BoolVar(&j.Wait, "wait", true, "wait until the workflow has ended")
	flags.StringVar(&j.Namespace, "namespace", "", "namespace (default: the pod's, or that of the kubeconfig's context)")
	flags.StringVar(&kubeconfig, "kubeconfig", "", kube.Flag)
	return cmd
}
