package images

import (
	"bytes"
	"runtime/debug"

	"github.com/CycloneDX/cyclonedx-go"
)

// BillType is the type of the artifact that holds an image's bill of
// materials, and of the one file in it.
const BillType = "application/vnd.cyclonedx+json"

// PredicateType is the type of a signed statement with a bill of materials.
const PredicateType = "https://cyclonedx.org/bom"

// Bill lists the modules that the program was built from, as the Go linker
// wrote them into it, in CycloneDX JSON. The same program gives the same bill.
func (p *Program) Bill() ([]byte, error) {
	main := component(&p.Info.Main)
	main.Type = cyclonedx.ComponentTypeApplication
	main.Name = p.Info.Path
	modules := []cyclonedx.Component{component(&debug.Module{Path: "stdlib", Version: p.Info.GoVersion})}
	for _, m := range p.Info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		modules = append(modules, component(m))
	}
	bom := cyclonedx.NewBOM()
	bom.Metadata = &cyclonedx.Metadata{Component: &main}
	bom.Components = &modules
	var buf bytes.Buffer
	if err := cyclonedx.NewBOMEncoder(&buf, cyclonedx.BOMFileFormatJSON).SetPretty(true).Encode(bom); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

func component(m *debug.Module) cyclonedx.Component {
	url := "pkg:golang/" + m.Path + "@" + m.Version
	c := cyclonedx.Component{
		BOMRef: url, Type: cyclonedx.ComponentTypeLibrary,
		Name: m.Path, Version: m.Version, PackageURL: url,
	}
	if m.Sum != "" { // go.sum's hash, of the module's files
		c.Properties = &[]cyclonedx.Property{{Name: "go:sum", Value: m.Sum}}
	}
	return c
}
