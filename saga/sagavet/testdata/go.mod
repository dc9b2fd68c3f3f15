module example.com

go 1.26

require (
	example.org/ids v1.0.0
	github.com/deed-go/deed v0.0.0
	github.com/google/uuid v1.6.0
	golang.org/x/sync v0.24.0
)

// What the packages here import is made up as far as the analyser needs it.
replace (
	example.org/ids => ./ids
	github.com/deed-go/deed => ./deed
	github.com/google/uuid => ./uuid
	golang.org/x/sync => ./sync
)
