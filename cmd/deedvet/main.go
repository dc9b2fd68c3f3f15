package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"

	"golang.org/x/tools/go/analysis/unitchecker"

	"github.com/deed-go/deed/saga/sagavet"
)

const usage = `deedvet reports code of sagas that would not do the same when a run is replayed:
the time, random values, I/O, goroutines and the order of maps outside of steps.

Usage: deedvet [flags of go vet] [packages]

  deedvet ./...                           check the module
  deedvet -json ./shop                    for scripts
  go vet -vettool=$(which deedvet) ./...  the same, as go vet runs it

What is right although it is reported is vouched for in the code, on the line,
above it, or above the function:

  //deed:deterministic REASON

The exit code is 0 when nothing was found, and 1 when something was, or when a
package does not compile. With -json it is 0 also when something was found.
What is reported, and why: go doc github.com/deed-go/deed/saga/sagavet
`

func main() {
	args := os.Args[1:]
	if fromGoVet(args) {
		unitchecker.Main(sagavet.Analyzer) // does not return
	}
	os.Exit(run(args, os.Stdout, os.Stderr))
}

// fromGoVet reports whether it is go vet that runs this program: it asks for
// its version and its flags, and then has it check one package after the other.
func fromGoVet(args []string) bool {
	return slices.ContainsFunc(args, func(arg string) bool {
		return arg == "-V=full" || arg == "-flags" || strings.HasSuffix(arg, ".cfg")
	})
}

// run has go vet run this program over the packages: it loads them, their
// dependencies too, and remembers what has not changed.
func run(args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 || slices.Contains(args, "help") || slices.ContainsFunc(args, func(arg string) bool {
		return arg == "-h" || strings.TrimLeft(arg, "-") == "help"
	}) {
		if len(args) == 0 {
			fmt.Fprint(stderr, usage)
			return 2
		}
		fmt.Fprint(stdout, usage)
		return 0
	}
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintf(stderr, "deedvet: find this program, for go vet to run it: %v\n", err)
		return 2
	}
	vet := exec.Command("go", append([]string{"vet", "-vettool=" + self}, args...)...)
	vet.Stdin, vet.Stdout, vet.Stderr = os.Stdin, stdout, stderr
	err = vet.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return max(exit.ExitCode(), 1)
	}
	if err != nil {
		fmt.Fprintf(stderr, "deedvet: run go vet, which must be in PATH: %v\n", err)
		return 2
	}
	return 0
}
