// Same compares two JSON objects field by field and fails when they differ.
//
//	go run ./.ci/same expected.json got.json [field to ignore ...]
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"slices"
)

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: same expected.json got.json [field to ignore ...]")
		os.Exit(2)
	}
	expected, got := read(os.Args[1]), read(os.Args[2])
	ignored := os.Args[3:]
	different, compared := 0, 0
	for name := range union(expected, got) {
		if slices.Contains(ignored, name) {
			continue
		}
		compared++
		if e, g := expected[name], got[name]; e != g {
			different++
			fmt.Printf("%s: expected %s, got %s\n", name, orMissing(e), orMissing(g))
		}
	}
	if different > 0 {
		fmt.Printf("%s: %d fields differ from %s\n", os.Args[2], different, os.Args[1])
		os.Exit(1)
	}
	fmt.Printf("%s: all %d values equal %s\n", os.Args[2], compared, os.Args[1])
}

// read returns every value in the file by its path, for example
// months.2000-01.issued.
func read(name string) map[string]string {
	data, err := os.ReadFile(name)
	if err == nil {
		decoder := json.NewDecoder(bytes.NewReader(data))
		decoder.UseNumber()
		var value any
		if err = decoder.Decode(&value); err == nil {
			flat := map[string]string{}
			flatten(flat, "", value)
			return flat
		}
	}
	fmt.Fprintf(os.Stderr, "same: %s: %v\n", name, err)
	os.Exit(2)
	return nil
}

func flatten(flat map[string]string, path string, value any) {
	object, ok := value.(map[string]any)
	if !ok {
		text, _ := json.Marshal(value)
		flat[path] = string(text)
		return
	}
	if path != "" {
		flat[path] = "an object"
		path += "."
	}
	for name, inner := range object {
		flatten(flat, path+name, inner)
	}
}

func union(a, b map[string]string) map[string]bool {
	all := map[string]bool{}
	for name := range a {
		all[name] = true
	}
	for name := range b {
		all[name] = true
	}
	return all
}

func orMissing(text string) string {
	if text == "" {
		return "nothing"
	}
	return text
}
