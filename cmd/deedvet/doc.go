// Deedvet reports code of sagas that would not do the same when a run is
// replayed. Package sagavet says what is reported, and how to vouch for what is
// right.
//
//	go install github.com/deed-go/deed/cmd/deedvet@latest
//	deedvet ./...
//
// It has go vet load the packages, so the flags of go vet are its own (-json,
// -tags, -c), and what has not changed is not checked again. Go vet can also be
// asked itself, with the same outcome:
//
//	go vet -vettool=$(which deedvet) ./...
//
// The exit code is 0 when nothing was found, 1 when something was or a package
// does not compile, and 2 when it could not run.
package main
